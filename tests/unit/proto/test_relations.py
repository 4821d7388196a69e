"""Layer choice, relation heads and the three forms, against the formulas written out in numpy float64."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from teacher_proto.compute.relations import FORMS, layer_index, relation_heads_of, relations


def relation_in_numpy(states_THd: np.ndarray, form: str, relation_heads: int) -> np.ndarray:
    """[R, T, T] of [T, H, dh], one row at a time."""
    length = len(states_THd)
    out = np.zeros((relation_heads, length, length))
    flat_TD = states_THd.reshape(length, -1).astype(np.float64)
    for head, part_Td in enumerate(np.split(flat_TD, relation_heads, axis=1)):
        for i in range(length):
            seen = i + 1 if form == "minilm" else length
            if form == "official":
                norms = np.linalg.norm(part_Td, axis=1)
                scores = part_Td[:seen] @ part_Td[i] / (norms[:seen] * norms[i])
            else:
                scores = part_Td[:seen] @ part_Td[i] / np.sqrt(part_Td.shape[1])
            weights = np.exp(scores - scores.max())
            out[head, i, :seen] = weights / weights.sum()
    return np.maximum(out, 1e-8) if form == "official" else out


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("relation_heads", [1, 3, 6, 12])
def test_relations_follow_their_formula(form: str, relation_heads: int) -> None:
    states_THd = np.random.default_rng(0).normal(size=(9, 3, 4)) * 2
    computed = relations(torch.tensor(states_THd), form=form, relation_heads=relation_heads)
    np.testing.assert_allclose(computed, relation_in_numpy(states_THd, form, relation_heads), rtol=2e-5, atol=1e-8)


def test_a_batch_and_single_rows_are_parts_of_the_whole() -> None:
    states_BTHd = torch.randn(2, 9, 4, 8)
    whole = relations(states_BTHd, form="minilm", relation_heads=2)
    rows_r = torch.tensor([7, 0, 3])
    assert whole.shape == (2, 2, 9, 9)
    torch.testing.assert_close(
        relations(states_BTHd, form="minilm", relation_heads=2, rows_r=rows_r), whole[:, :, rows_r]
    )
    torch.testing.assert_close(relations(states_BTHd[1], form="minilm", relation_heads=2), whole[1])


def test_heads_are_laid_side_by_side_and_cut_again() -> None:
    states_THd = torch.arange(2 * 3 * 4).view(2, 3, 4)
    heads = relation_heads_of(states_THd, 2)
    assert heads.shape == (2, 2, 6)
    assert heads[0, 0].tolist() == [0, 1, 2, 3, 4, 5] and heads[1, 1].tolist() == [18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize("relation_heads", [5, 0, -1, 24])
def test_relation_heads_that_do_not_divide_the_width_are_refused_with_the_numbers(relation_heads: int) -> None:
    with pytest.raises(
        ValueError, match=rf"relation heads: {relation_heads} do not divide the width 12 \(3 heads of 4\)"
    ):
        relation_heads_of(torch.zeros(2, 3, 4), relation_heads)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'cosine', expected one of"):
        relations(torch.zeros(2, 3, 4), form="cosine", relation_heads=1)


@pytest.mark.parametrize(
    ("layer", "num_layers", "expected"),
    [
        ("late_middle", 28, 20), ("late_middle", 30, 21), ("late_middle", 2, 1), ("late_middle", 1, 0),
        ("first", 12, 0), ("middle", 12, 6), ("last", 12, 11), (0.0, 28, 0), (24 / 28, 28, 24), (1.0, 28, 27),
        (0, 5, 0), (4, 5, 4), (-1, 5, 4), (-5, 5, 0),
    ],
)  # fmt: skip
def test_layer_by_name_fraction_or_index(layer: int | float | str, num_layers: int, expected: int) -> None:
    assert layer_index(layer, num_layers=num_layers) == expected


def test_the_default_layer_is_late_but_not_the_last() -> None:
    for num_layers in range(4, 80):
        assert num_layers / 2 <= layer_index(num_layers=num_layers) < num_layers - 1


@pytest.mark.parametrize("layer", ["top", 28, -29, 1.5, -0.1, float("nan"), True, None])
def test_layers_that_do_not_exist_are_refused(layer: object) -> None:
    with pytest.raises(ValueError, match="attention layer: got"):
        layer_index(layer, num_layers=28)


def test_importing_the_definition_does_not_import_torch() -> None:
    code = "import sys, teacher_proto.compute.relations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

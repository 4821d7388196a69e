"""The output head out of a checkpoint: where it is found, what is done to its product, when it is not to be trusted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from teacher_proto.compute.head import HeadScaling, scaling_of
from teacher_proto.targets import TokenTargets
from teacher_service.head import CheckpointHead

V, D = 40, 8


def checkpoint(path: Path, **tensors: torch.Tensor) -> list[Path]:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    return [path / "model.safetensors"]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def record(logits_RV: torch.Tensor, hidden_RD: torch.Tensor) -> TokenTargets:
    values, ids = logits_RV.topk(1)
    lse = logits_RV.logsumexp(dim=1)
    return TokenTargets(
        start=0, ids=ids.numpy().astype(np.uint16), logprobs=(values - lse[:, None]).half().numpy(), lse=lse.numpy(),
        hidden=hidden_RD.half().numpy(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "soft_cap", "scale"),
    [
        ({}, None, 1.0),
        ({"final_logit_softcapping": 30.0}, 30.0, 1.0),
        ({"final_logit_softcapping": None, "logit_scale": None, "logits_scaling": None}, None, 1.0),
        ({"logits_scaling": 8.0}, None, 0.125),
        ({"logit_scale": 0.0625}, None, 0.0625),
        ({"text_config": {"final_logit_softcapping": 20.0}}, 20.0, 1.0),
    ],
)
def test_scaling_is_what_the_config_says(config: dict[str, Any], soft_cap: float | None, scale: float) -> None:
    assert scaling_of(config) == HeadScaling(soft_cap, scale)


def test_scaling_is_a_soft_cap_then_a_factor() -> None:
    z = torch.tensor([[-50.0, 0.5, 90.0]])
    expected = np.tanh(z.numpy() / 30) * 30 * 0.25
    np.testing.assert_allclose(HeadScaling(30.0, 0.25)(z).numpy(), expected, rtol=1e-6)


def test_an_own_head_is_preferred_to_the_embeddings_and_padding_is_cut(tmp_path: Path) -> None:
    own, bias = draw(V + 24, D), draw(V + 24)
    files = checkpoint(tmp_path, lm_head__weight=own, lm_head__bias=bias, model__embed_tokens__weight=draw(V, D) * 2)
    file = CheckpointHead(files, V, HeadScaling(5.0, 0.5)).file()
    written = load(file.read(0, file.size))
    assert set(written) == {"weight", "bias", "soft_cap", "scale"}
    assert torch.equal(written["weight"], own[:V]) and torch.equal(written["bias"], bias[:V])
    assert written["soft_cap"] == 5.0 and written["scale"] == 0.5
    whole = file.read(0, file.size)
    for start, stop in ((0, 1), (3, 900), (file.size - 5, file.size), (200, 1301), (0, file.size)):
        assert file.read(start, stop) == whole[start:stop]
    assert file.sha256() == hashlib.sha256(whole).digest()


def test_a_tied_head_is_the_embeddings(tmp_path: Path) -> None:
    embeddings = draw(V, D).bfloat16()
    head = CheckpointHead(checkpoint(tmp_path, model__embed_tokens__weight=embeddings), V, HeadScaling())
    assert torch.equal(head.tensors()["weight"], embeddings)


@pytest.mark.parametrize("scaling", [HeadScaling(), HeadScaling(3.0, 0.5)])
def test_a_head_that_makes_the_logits_passes_and_any_other_is_refused(tmp_path: Path, scaling: HeadScaling) -> None:
    weight, bias, hidden = draw(V, D), draw(V), draw(16, D)
    files = checkpoint(tmp_path, lm_head__weight=weight, lm_head__bias=bias)
    logits = scaling(hidden @ weight.T + bias)
    head = CheckpointHead(files, V, scaling)
    head.check(record(logits, hidden))
    for wrong in (logits * 1.2, logits.roll(1, dims=1), logits * torch.nan):
        with pytest.raises(ValueError, match="other logits"):
            head.check(record(wrong, hidden))
    with pytest.raises(ValueError, match="takes 8 values"):
        head.check(record(logits, hidden[:, :4]))


def test_a_quantised_head_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantised"):
        CheckpointHead(
            checkpoint(tmp_path, lm_head__weight=draw(V, D).to(torch.float8_e4m3fn)), V, HeadScaling()
        ).tensors()
    with pytest.raises(ValueError, match="the checkpoint has none of"):
        CheckpointHead(checkpoint(tmp_path, model__norm__weight=draw(D)), V, HeadScaling())

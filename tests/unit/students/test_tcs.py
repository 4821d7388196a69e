"""The loss of a block-diffusion student at masked tokens, against figures worked out apart from this code, and which
row of the teacher each family learns from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student_trainer import loop
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.view import ViewSeed
from student_trainer.cli.compose import compose
from student_trainer.losses import head_loss, token_term
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.diffusion_record import DiffusionRecord
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets
from tests.trainer_run import ScriptedTargets, Workshop, lines_of, run_here

# Five tokens; the teacher's logits from the last two of a text, and the student's by row (noisy half).
TEXT, VOCABULARY = (3, 1, 4, 2), 5
STUDENT = ((0, 1, 2, 0.5, 1.5), (1, 0.2, 1.8, 0.4, 0), (0.5, 1.5, 0, 2, 1), (2, 0.3, 1, 0.6, 1.2))
CAUSAL = (  # the teacher's distribution of each token, given those before it
    (0.059248, 0.293457, 0.119311, 0.131859, 0.396126),
    (0.317593, 0.212889, 0.387909, 0.058019, 0.023589),
    (0.312021, 0.076943, 0.051577, 0.093979, 0.465480),
    (0.147214, 0.162697, 0.488768, 0.120529, 0.080793),
)
GOLDEN = {  # family, K, settings, rows the teacher is off by: KL in nats at the masked tokens 1 and 3
    ("in_place", 2, "bucket", 1.0, 0): (0.030402, 0.377924),
    ("in_place", 2, "renormalise", 1.0, 0): (0.043061, 0.015955),
    ("in_place", 2, "truncate", 1.0, 0): (0.033396, 0.647298),
    ("in_place", 2, "bucket", 2.0, 0): (0.008095, 0.085501),
    ("in_place", 5, "bucket", 1.0, 0): (0.128084, 0.422437),
    ("in_place", 2, "bucket", 1.0, 1): (0.675529, 0.817855),
    ("token_shift", 2, "bucket", 1.0, 0): (0.337563, 0.731446),
    ("token_shift", 2, "renormalise", 1.0, 0): (0.339088, 0.764754),
    ("token_shift", 2, "truncate", 1.0, 0): (0.501201, 0.965412),
    ("token_shift", 5, "bucket", 1.0, 0): (0.479480, 0.821941),
}


class MaskedAt(DiffusionReader):
    """The tokens 1 and 3 are masked in the first view."""

    def _noise(self, batch: Batch, maskable_BT: np.ndarray, seed: ViewSeed) -> tuple[np.ndarray, np.ndarray]:
        masked_BT = maskable_BT & np.isin(batch.position_ids_BT, (1, 3))
        return masked_BT, np.full(masked_BT.shape, 0.5)


def teacher_logits() -> torch.Tensor:
    """[5, V]: row l is the distribution of token l; before the start both tokens count as 0."""
    before = (0, 0, *TEXT)
    v = torch.arange(VOCABULARY, dtype=torch.float64)
    rows = []
    for l in range(len(TEXT) + 1):  # noqa: E741 - a token's place, as in the formula
        u2, u1 = before[l : l + 2]
        rows.append(((2 * u1 + 3 * u2 + v * (u1 + 2) + v * v) % 7) / 2 + v / 10)
    return torch.stack(rows)


def test_the_teacher_is_the_references() -> None:
    torch.testing.assert_close(teacher_logits().softmax(-1)[:4], torch.tensor(CAUSAL).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("family", "k", "tail", "temperature", "off"), GOLDEN)
def test_it_is_that_of_the_reference(family: Any, k: int, tail: Any, temperature: float, off: int) -> None:
    """With the teacher off by one row the figures are others, and are the reference's for that mistake."""
    batch = build_batch(0, [[Placed(0, "x", np.array(TEXT, np.int32), None)]], 4, 0, ("x",))
    # The teacher's row t is its distribution of token t + 1.
    z_RV = teacher_logits()[1 + off : 4 + off]
    top = z_RV.log_softmax(-1).topk(k)
    log_z_R1 = (z_RV / temperature).logsumexp(-1) - z_RV.logsumexp(-1) / temperature
    answer = TokenTargets(
        start=0, ids=top.indices.numpy().astype(np.int32), logprobs=top.values.numpy().astype(np.float32),
        log_z=log_z_R1[:, None].numpy().astype(np.float32) if temperature != 1.0 else None,
    )  # fmt: skip
    spec = TargetSpec(("top_k",), k, (temperature,) if temperature != 1.0 else ())
    assert 0 not in TEXT  # so it may be the mask
    reader = MaskedAt(DiffusionRecord(4, 0, family, "block_causal"))
    first, _ = cut(batch, BatchTargets((answer,), spec, ""), reader, ViewSeed(5))
    hidden_ND = torch.cat([torch.tensor(STUDENT, dtype=torch.float64), torch.full((4, 5), torch.nan).double()])
    term = token_term("tcs", "tcs", 1.0, tail=tail, temperature=temperature)
    loss = head_loss(
        hidden_ND[first.view.rows_N], torch.eye(5, dtype=torch.float64), first.view.labels_N, first.teacher, [term]
    )
    expected = GOLDEN[family, k, tail, temperature, off]
    assert loss.per_term["tcs"].tolist() == pytest.approx(expected, abs=2e-6)
    assert float(loss.total) / first.view.count == pytest.approx(sum(expected) / 2, abs=2e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "truncate"])
@pytest.mark.parametrize("family", ["in_place", "token_shift"])
def test_its_gradient_is_that_of_the_formula_in_float64(family: Any, tail: Any) -> None:
    batch = build_batch(0, [[Placed(0, "x", np.array(TEXT, np.int32), None)]], 4, 0, ("x",))
    log_p_RV = teacher_logits()[1:4].log_softmax(-1)
    top = log_p_RV.topk(2)
    answer = TokenTargets(
        start=0, ids=top.indices.numpy().astype(np.int32), logprobs=top.values.numpy().astype(np.float32)
    )
    reader = MaskedAt(DiffusionRecord(4, 0, family, "block_causal"))
    first, _ = cut(batch, BatchTargets((answer,), TargetSpec(("top_k",), 2), ""), reader, ViewSeed(5))
    ours_RV, theirs_RV = (torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = head_loss(
        ours_RV[first.view.rows_N], torch.eye(5, dtype=torch.float64), first.view.labels_N, first.teacher,
        [token_term("tcs", "tcs", 1.0, tail=tail)],
    )  # fmt: skip
    loss.total.backward()
    expected = torch.zeros((), dtype=torch.float64)
    for token in (1, 3):
        log_p_V = log_p_RV[token - 1]
        log_q_V = theirs_RV[token if family == "in_place" else token - 1].log_softmax(-1)
        at = log_p_V.topk(2).indices
        log_p_K, log_q_K = log_p_V[at], log_q_V[at]
        if tail == "renormalise":
            log_p_K, log_q_K = log_p_K.log_softmax(-1), log_q_K.log_softmax(-1)
        expected = expected + (log_p_K.exp() * (log_p_K - log_q_K)).sum()
        if tail == "bucket":
            p, q = 1 - log_p_K.exp().sum(), 1 - log_q_K.exp().sum()
            expected = expected + p * (p / q).log()
    expected.backward()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ours_RV.grad is not None
    torch.testing.assert_close(ours_RV.grad, theirs_RV.grad, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("family", ["in_place", "token_shift"])
def test_a_run_learns_cross_entropy_and_scores(workshop: Workshop, tmp_path: Path, family: str) -> None:
    arguments = workshop.settings(
        tmp_path, "student=diffusion", "student.diffusion.block_size=4", f"student.diffusion.family={family}",
        "student.diffusion.masks=suffix", "distillation=tcs", "distillation.terms.tcs.coefficient=2", "run.steps=30",
    )  # fmt: skip
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    lines = lines_of(tmp_path / "run")
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/cross_entropy"] + 2 * line["loss/tcs"], rel=1e-6)
    first, last = (np.mean([line["loss/tcs"] for line in part]) for part in (lines[:5], lines[-5:]))
    assert 0 < last < 0.95 * first


def test_a_student_that_masks_nothing_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tcs \(tcs\) is on masked tokens, but .* masks none.*student=diffusion"):
        run_here(workshop.settings(tmp_path, "distillation=tcs"), ScriptedTargets())
    with pytest.raises(ValueError, match="Input should be 'top_k'"):
        compose(workshop.settings(tmp_path, "distillation=tcs", "distillation.terms.tcs.support=full"))

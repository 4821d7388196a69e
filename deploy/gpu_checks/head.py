"""Checks the fused head on the device, values and gradients, against the tests' dense oracle in float64 on the CPU.

Every kind of divergence on every support, with every tail and T = 1, 2, 5, in several blocks of rows, some of them
without a label or a teacher. All of it in float32; each kind on each support also in the two ways in which a run
computes in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from deploy.gpu_checks.report import Options, Report
from student_trainer.batch.head import Head
from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.losses.head import head_loss
from student_trainer.settings.terms import KINDS
from tests.unit.losses import dense

TEMPERATURES = (1.0, 2.0, 5.0)
K, DRAWS, TEACHER_WIDTH = 9, 7, 24
# By name: the dtype of hidden states and head, the dtype that the student computes in, and the bound on the relative
# error of the value and of each gradient. bfloat16 states are rounded on both sides, so only the gradients' rounding
# remains; where float32 states are multiplied in bfloat16, that of the products does too.
WAYS = {
    "float32": (torch.float32, torch.float32, 2e-5),
    "bfloat16": (torch.bfloat16, torch.bfloat16, 2e-2),
    "float32 computed in bfloat16": (torch.float32, torch.bfloat16, 5e-2),
}


FORWARD = ("forward_kl", "top_k_kl", "tcs")  # KL(teacher‖student), the only divergence that may leave the tail out


def run(report: Report, options: Options) -> None:
    # Two chunks, of which the first has two blocks where torch's operations work by blocks.
    rows, vocab_size, width, chunk = (23, 203, 16, 8) if options.tiny else (300, 10_007, 128, 250)
    for way, (dtype, _, _) in WAYS.items():
        inputs = _Inputs(rows, vocab_size, width, dtype)
        for settings in _every_term():
            usual = settings.get("temperature", 2.0) == 2.0 and settings.get("tail", "bucket") == "bucket"
            if way == "float32" or usual:
                _compare(report, settings, inputs, chunk, options.device, way)


def _every_term() -> Iterator[dict[str, Any]]:
    yield {"kind": "cross_entropy"}
    for kind, model in KINDS.items():
        fields = model.model_fields
        if "temperature" not in fields:
            continue
        supports = get_args(fields["support"].annotation)
        tails = get_args(fields["tail"].annotation) if "tail" in fields else (None,)
        for temperature in TEMPERATURES:
            for support in supports:
                for tail in tails if support != "full" else tails[:1]:
                    if tail == "truncate" and kind not in FORWARD:
                        continue  # refused by the settings: nothing would limit the rest of the mass
                    settings = {"kind": kind, "support": support, "temperature": temperature}
                    yield settings | ({"tail": tail} if tail else {})


class _Inputs:
    """Leaves in `dtype`, and a teacher's targets for their rows, also in float64; all on the CPU."""

    def __init__(self, rows: int, vocab_size: int, width: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.hidden_ND = torch.randn(rows, width).to(dtype)
        self.weight_VD = (torch.randn(vocab_size, width) * 3 / width**0.5).to(dtype)
        self.labels_N = torch.randint(vocab_size, (rows,))
        self.labels_N[3] = -100
        self.teacher_hidden_NE = torch.randn(rows, TEACHER_WIDTH)
        self.teacher_weight_VE = torch.randn(vocab_size, TEACHER_WIDTH) * 3 / TEACHER_WIDTH**0.5
        self.teacher_NV = self.teacher_hidden_NE.double() @ self.teacher_weight_VE.double().T
        self.valid_N = torch.arange(rows) != 5
        self.own_ids_NK = (self.hidden_ND.float() @ self.weight_VD.float().T).topk(K).indices
        self.drawn = {t: torch.multinomial((self.teacher_NV / t).softmax(-1), DRAWS, True) for t in TEMPERATURES}

    def teacher(self, temperature: float) -> TeacherRows:
        served = dense.rows_of(self.teacher_NV, K, TEMPERATURES[1:])
        found = [row.unique(return_counts=True) for row in self.drawn[temperature]]
        return replace(
            served,
            logprobs_NK=served.logprobs_NK.float(),
            lse_N=served.lse_N.float(),
            log_z_NT=served.log_z_NT.float(),
            valid_N=self.valid_N,
            gather_ids_NG=self.own_ids_NK,
            gather_logprobs_NG=self.teacher_NV.log_softmax(-1).gather(1, self.own_ids_NK).float(),
            sampled_offsets=torch.tensor([0, *(len(ids) for ids, _ in found)]).cumsum(0),
            sampled_ids=torch.cat([ids for ids, _ in found]).int(),
            sampled_counts=torch.cat([counts for _, counts in found]).int(),
            sampled_temperature=temperature,
            teacher_hidden_NE=self.teacher_hidden_NE,
            teacher_head=Head(self.teacher_weight_VE),
        )


def _compare(report: Report, settings: dict[str, Any], inputs: _Inputs, chunk: int, device: str, way: str) -> None:
    _, compute, bound = WAYS[way]
    kind, temperature = settings["kind"], settings.get("temperature", 1.0)
    term = dense.term_of(kind, 1.7, **{name: value for name, value in settings.items() if name != "kind"})
    teacher = inputs.teacher(temperature)
    hidden_ND, weight_VD = (
        leaf.to(device, copy=True).requires_grad_() for leaf in (inputs.hidden_ND, inputs.weight_VD)
    )
    result = head_loss(
        hidden_ND, weight_VD, inputs.labels_N.to(device), teacher.to(device), [term], chunk_rows=chunk, compute=compute
    )
    ours = torch.autograd.grad(result.total, (hidden_ND, weight_VD))
    leaves = [leaf.double().requires_grad_() for leaf in (inputs.hidden_ND, inputs.weight_VD)]
    values_N = _true_values(term, dense.logits(*leaves), inputs, teacher, temperature)
    counts_N = inputs.labels_N >= 0 if kind == "cross_entropy" else inputs.valid_N
    total = 1.7 * (values_N * counts_N).sum()
    truth = torch.autograd.grad(total, leaves)
    errors = [float((result.total.detach().cpu().double() - total.detach()).abs() / total.detach().abs())]
    errors += [float((mine.cpu().double() - true).norm() / true.norm()) for mine, true in zip(ours, truth, strict=True)]
    name = f"{way}: {kind}"
    name += "".join(f" {value}" if name != "temperature" else f" T={value:g}"
                    for name, value in settings.items() if name != "kind")  # fmt: skip
    worst = max(errors) if all(error == error for error in errors) else float("nan")
    report.close(name, worst, bound)


def _true_values(term: Any, student_NV: Tensor, inputs: _Inputs, teacher: TeacherRows, temperature: float) -> Tensor:
    if term.support == "sampled":
        drawn_NS = inputs.drawn[temperature]
        share_NS = torch.full_like(drawn_NS, 1, dtype=torch.float64) / DRAWS
        target_NV = torch.zeros_like(student_NV).scatter_add(1, drawn_NS, share_NS)
        cross_N = torch.nn.functional.cross_entropy(student_NV / temperature, target_NV, reduction="none")
        return cross_N * (temperature**2 if term.settings.temperature_squared else 1.0)
    ids_NK = {"top_k": teacher.ids_NK, "gather": inputs.own_ids_NK}.get(term.support)
    return dense.term_values(
        term, student_NV, inputs.labels_N, inputs.teacher_NV, None if ids_NK is None else ids_NK.long()
    )

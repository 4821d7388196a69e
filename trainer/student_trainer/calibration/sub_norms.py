"""Sets the gains of a newly quantised student's SubLN norms so that its model computes about the same as without them.
Called by `start`, before a run's first step.

A norm divides a token's features by their RMS, which is far from 1 where SubLN is added (before o_proj and down_proj):
with gains of 1 a pretrained model is worse than a uniform guess, before a single weight is quantised. With the typical
RMS as its gain, a norm leaves a token of that RMS unchanged. Typical is the geometric mean over tokens: an arithmetic
mean would be dominated by the few tokens with huge activations that language models have, such as the first of a text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.calibration.layer_passes import in_full_precision, standing_still
from student_trainer.ranks import ALONE, Ranks
from student_trainer.students.quant_linear import QuantLinear, quant_linears
from student_trainer.students.student import Student
from teacher_proto.process.stages import stage

logger = logging.getLogger(__name__)


def untrained_sub_norms(model: nn.Module) -> dict[str, QuantLinear]:
    """The linears whose SubLN is still as it was added, with gains of one; empty if any has other gains."""
    normed = {name: layer for name, layer in quant_linears(model) if layer.rms_norm is not None}
    return normed if all(bool((_gains(layer) == 1).all()) for layer in normed.values()) else {}


def calibrate_sub_norms(student: Student, micros: Sequence[MicroBatch], ranks: Ranks = ALONE) -> dict[str, float]:
    """Set the gains of every SubLN norm to the geometric mean of its inputs' RMS over the text of `micros`, measured in
    full precision and without the norms. Each rank reads its own rows.

    Returns the gain by the linear's name. ValueError if a norm is given no token with a value other than 0.
    """
    normed = untrained_sub_norms(student.model)
    # For each norm, the sum of its tokens' log RMS and their number.
    sums_L2 = torch.zeros(len(normed), 2, dtype=torch.float64, device=student.device)
    reading = _Reading()
    with standing_still(student) as layers, ExitStack() as stack, stage("calibrating SubLN", len(micros)) as doing:
        for layer in layers:
            stack.enter_context(in_full_precision(layer))
        for linear, sum_2 in zip(normed.values(), sums_L2, strict=True):
            assert linear.rms_norm is not None
            stack.callback(linear.rms_norm.register_forward_hook(reading.into(sum_2)).remove)
        for micro in micros:
            view = micro.view
            reading.real_N = (view.attention.document_ids_BT >= 0).flatten()
            with student.autocast():
                student.body(view.input_ids_BT, view.position_ids_BT, view.attention)
            doing.done += 1
    gains: dict[str, float] = {}
    for (name, linear), (total, tokens) in zip(normed.items(), ranks.add_up(sums_L2).tolist(), strict=True):
        if not tokens:
            raise ValueError(
                f"{name} got only zeros as input from the first {len(micros)} micro batches: set "
                "student.quantisation.sub_norm_start=ones"
            )
        gains[name] = math.exp(total / tokens)
        with torch.no_grad():
            _gains(linear).fill_(gains[name])
    logger.info(
        "SubLN of %d linears starts with gains of %.3g to %.3g, the typical RMS of each one's input",
        len(gains), min(gains.values()), max(gains.values()),
    )  # fmt: skip
    return gains


def _gains(linear: QuantLinear) -> Tensor:
    assert linear.rms_norm is not None
    weight = linear.rms_norm.weight
    assert isinstance(weight, Tensor)
    return weight


class _Reading:
    """Makes the norms' hooks. `real_N`: which positions of the current micro batch are of documents."""

    real_N: Tensor

    def into(self, sum_2: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """A hook that adds the log RMS and the number of a norm's tokens to `sum_2`, and undoes the norm."""

        def measure(norm: nn.Module, args: tuple[Tensor, ...], normed: Tensor) -> Tensor:
            rms_N = args[0].double().flatten(0, -2).pow(2).mean(-1).sqrt()
            # An expert's norm has the tokens that were routed to it: which of them are padding isn't known there.
            if len(rms_N) == len(self.real_N):
                rms_N = rms_N[self.real_N]
            known_N = rms_N > 0
            sum_2[0] += rms_N[known_N].log().sum()
            sum_2[1] += known_N.sum()
            return args[0]

        return measure

"""Computes initial values for a quantised student's low-rank corrections, by the closed form of `reduced_rank`, layer
by layer. Called by `start`, before a run's first step.

The same text goes through the decoder twice, side by side: through the full-precision model, and through the student
with the corrections that are done. A decoder layer's linears are corrected in the order in which they are called, those
that share an input together: the second moments are summed over the text, the corrections are solved for and set, and
what follows sees the corrected outputs. There is one round: alternated with a round-to-nearest quantiser, the error
rises.

A layer that is done is saved to a file. A calibration that was interrupted reads these files, runs the text through
their layers, and continues, with the same result bit for bit. Each rank sums over its own rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.calibration.layer_files import LayerFiles, LayerFound
from student_trainer.calibration.layer_passes import (
    Entrance,
    call,
    enter,
    groups,
    in_full_precision,
    input_of,
    quantised_once,
    standing_still,
)
from student_trainer.ranks import ALONE, Ranks
from student_trainer.settings import LRCSettings
from student_trainer.students.adapters.low_rank import LowRank
from student_trainer.students.adapters.reduced_rank import Inputs, Residuals, balanced, error, solve
from student_trainer.students.quant_linear import QuantLinear
from student_trainer.students.student import Student
from teacher_proto.process.stages import stage

logger = logging.getLogger(__name__)
FOLDER = "calibration"  # within a run's folder


def calibrate(
    student: Student, micros: Sequence[MicroBatch], settings: LRCSettings, folder: Path, digest: str,
    ranks: Ranks = ALONE,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Set every correction of the student to the closed form over the text of `micros`.

    Returns, by the linear's name, the squared error of its outputs over the text before and after. `digest`: of
    everything that decides the outcome. ValueError if there is too little text.
    """
    files = LayerFiles(folder, digest)
    errors: dict[str, tuple[float, float]] = {}
    with standing_still(student) as layers, stage("calibrating corrections", len(layers), "layers") as doing:
        passes = _Passes(student, layers, micros, settings, ranks)
        kept = 0
        for number, layer in enumerate(layers):
            # Only an unbroken sequence of layers from the first on: a later one was solved with other layers before it.
            found = files.read(number) if kept == number else None
            # Ranks whose files are on different disks continue from the layers that all of them have.
            with quantised_once(layer):
                if ranks.largest(found is None):
                    found = passes.solve(number)
                    if ranks.first:
                        files.write(number, found)
                else:
                    assert found is not None
                    kept += 1
                    passes.put(found)
                passes.advance(number)
            errors |= found.errors
            doing.done += 1
    before, after = (sum(pair[side] for pair in errors.values()) for side in (0, 1))
    logger.info(
        "closed-form corrections of %d linears: their squared error falls from %.4g to %.4g (by %.1f %%)"
        "%s", len(errors), before, after, 100.0 * (1.0 - after / before) if before else 0.0,
        f"; {kept} of {len(layers)} layers were kept from an earlier start" if kept else "",
    )  # fmt: skip
    return errors


class _Passes:
    """The hidden states of the text before one layer, in the full-precision model and in the student."""

    def __init__(
        self, student: Student, layers: list[nn.Module], micros: Sequence[MicroBatch], settings: LRCSettings,
        ranks: Ranks,
    ) -> None:  # fmt: skip
        self._student, self._layers, self._settings, self._ranks = student, layers, settings, ranks
        self._names = {id(module): name for name, module in student.model.named_modules()}
        self._entrances = [enter(student, layers, micro) for micro in micros]
        self._ours = [entrance.hidden_BTD for entrance in self._entrances]
        # A full-precision pass is made only if it is the reference.
        self._exact = list(self._ours) if settings.reference == "full_precision" else None

    def solve(self, number: int) -> LayerFound:
        """Solve for the corrections of layer `number` and set them."""
        layer, tensors = self._layers[number], dict[str, Tensor]()
        errors: dict[str, tuple[float, float]] = {}
        for group in groups(layer, self._run(layer, self._ours[0], self._entrances[0], number)):
            corrected = [linear for linear in group if isinstance(linear.correction, LowRank)]
            for linear, (before, after) in self._solve_group(number, corrected):
                name = self._names[id(linear)]
                assert isinstance(linear.correction, LowRank)
                tensors |= {
                    f"{name}.A": linear.correction.lora_A.weight.detach().clone(),
                    f"{name}.B": linear.correction.lora_B.weight.detach().clone(),
                }
                errors[name] = before, after
        return LayerFound(tensors, errors)

    def put(self, found: LayerFound) -> None:
        """Set corrections that were found earlier."""
        for name in found.errors:
            correction = self._student.model.get_submodule(name).correction
            assert isinstance(correction, LowRank)
            correction.lora_A.weight.copy_(found.tensors[f"{name}.A"])
            correction.lora_B.weight.copy_(found.tensors[f"{name}.B"])

    def advance(self, number: int) -> None:
        """Run both passes through layer `number`, which is done."""
        layer = self._layers[number]
        for place, entrance in enumerate(self._entrances):
            self._ours[place] = self._run(layer, self._ours[place], entrance, number)()
            if self._exact is not None:
                with in_full_precision(layer):
                    self._exact[place] = self._run(layer, self._exact[place], entrance, number)()

    def _run(self, layer: nn.Module, hidden_BTD: Tensor, entrance: Entrance, number: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with self._student.autocast():
                return call(layer, hidden_BTD, entrance, number)

        return run

    def _solve_group(
        self, number: int, group: list[QuantLinear]
    ) -> list[tuple[QuantLinear, tuple[float, float]]]:  # fmt: skip
        """Correct linears that share an input; returns their squared errors before and after."""
        if not group:
            return []
        device = self._student.device
        inputs = Inputs(group[0].in_features, device)
        residuals = [Residuals(linear.out_features, linear.in_features, device) for linear in group]
        quantised = [linear.weight_quantiser.weight(linear, _one(linear)) for linear in group]
        for place, entrance in enumerate(self._entrances):
            ours_NI, exact_NI = self._inputs(number, group[0], place, entrance)
            rounded_NI = (
                ours_NI if (rounds := group[0].activation_quantiser) is None else rounds(ours_NI, _one(group[0]))
            )
            # S = X X^T of the student's own unrounded input, which is what the correction will be given.
            inputs.add(ours_NI.double())
            for linear, weight_OI, residual in zip(group, quantised, residuals, strict=True):
                # R: the full-precision layer's output minus that of the quantised weight on the rounded input.
                lacking_NO = F.linear(exact_NI, linear.weight.float()) - F.linear(rounded_NI, weight_OI.float())
                residual.add(lacking_NO.double(), ours_NI.double())
        self._ranks.add_up(inputs.moment_II)
        made = []
        for linear, residual in zip(group, residuals, strict=True):
            self._ranks.add_up(residual.cross_OI)
            self._ranks.add_up(residual.square)
            made.append((linear, self._correct(linear, residual, inputs.moment_II)))
        return made

    def _inputs(self, number: int, linear: QuantLinear, place: int, entrance: Entrance) -> tuple[Tensor, Tensor]:
        """The linear's input from a micro batch in the student, and the input of the output to imitate; both [N, I]."""
        layer = self._layers[number]
        ours = input_of(linear, self._run(layer, self._ours[place], entrance, number))
        exact = ours
        if self._exact is not None:
            with in_full_precision(layer):
                exact = input_of(linear, self._run(layer, self._exact[place], entrance, number))
        if ours is None or exact is None or ours.shape != exact.shape:
            raise ValueError(
                f"{self._names[id(linear)]} reads different tokens in the student and in the full-precision model: set "
                "student.lrc.reference=same_inputs, or leave it out of student.lrc.targets"
            )
        ours_NI, exact_NI = ours.flatten(0, -2).float(), exact.flatten(0, -2).float()
        if len(ours_NI) == len(entrance.real_N):
            ours_NI, exact_NI = ours_NI[entrance.real_N], exact_NI[entrance.real_N]
        return ours_NI, exact_NI

    def _correct(self, linear: QuantLinear, residual: Residuals, moment_II: Tensor) -> tuple[float, float]:
        """Set the linear's best correction, and return its errors before and after. All ranks take the first rank's."""
        correction = linear.correction
        assert isinstance(correction, LowRank) and correction.alpha == correction.rank
        # Every rank has the same sums, but eigenvectors by other libraries may differ in sign and more.
        u_OR, vt_RI = solve(residual.cross_OI, moment_II, self._settings.damping).cut(correction.rank)
        for mine, values in zip((correction.lora_B, correction.lora_A), balanced(u_OR, vt_RI), strict=True):
            values = values.contiguous()  # ranks add up raw memory, whatever its layout
            mine.weight.copy_(self._ranks.add_up(values if self._ranks.first else torch.zeros_like(values)))
        b_OR, a_RI = correction.lora_B.weight.double(), correction.lora_A.weight.double()
        return float(residual.square), float(error(residual, moment_II, b_OR, a_RI))


def _one(linear: QuantLinear) -> Tensor:
    """The blend at which everything is quantised."""
    return torch.ones_like(linear.quantisation_blend)

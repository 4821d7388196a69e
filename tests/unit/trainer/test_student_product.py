"""Every student of the product architecture x quantiser x adapter, made of the dicts themselves: it trains, goes on bit
for bit, is exported in each format that its quantiser names, and is read again to the same logits; or it is refused
with the reason.
"""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer import loop
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli import check
from student_trainer.cli.export import model_of
from student_trainer.export.card import ModelCard
from student_trainer.export.check import compare_logits, transformers_logits
from student_trainer.export.export import EXPORTS
from student_trainer.export.expression import CannotExpressError
from student_trainer.export.packed import load_packed
from student_trainer.export.packed_reader import read_packed
from student_trainer.settings import LoRASettings, LRCSettings, QuantisationSettings, StudentSettings
from student_trainer.students import load
from student_trainer.students.adapters.low_rank import corrections
from student_trainer.students.load import ADAPTERS, ARCHITECTURES, check_cell
from student_trainer.students.pretrained import load_quantised
from student_trainer.students.quant_linear import quant_linears
from student_trainer.students.quantisers import QUANTISERS
from tests.models import save_tiny_llama
from tests.trainer_run import Workshop, final_files, lines_of, run_here, trace_of

Cell = tuple[str, str, str]

CPU = torch.device("cpu")
CARD = ModelCard("tiny", "tiny-base", "", "")
ALL: list[Cell] = list(product(ARCHITECTURES, QUANTISERS, ADAPTERS))
LORA = LoRASettings(rank=3, alpha=6)
LRC = LRCSettings(rank=0.1, sequences=4)
# The closed form is of weights that are quantised in full, in a model without SubLN.
UNNORMED = QuantisationSettings(sub_norm="none")
WARMED, OF_LRC = ("student.quantisation.warmup_steps=1",), ("student.quantisation.sub_norm=none",)
OF_ADAPTER: dict[str, tuple[str, ...]] = {
    "none": (),
    "lora": ("student.lora.rank=3", "student.lora.alpha=6", "optim.learning_rate=1e-1"),
    "lrc": ("student.lrc.rank=0.1", "student.lrc.sequences=4"),
}


def settings_of(cell: Cell, **more: Any) -> StudentSettings:
    architecture, quantiser, adapter = cell
    own: dict[str, Any] = {"lora": {"lora": LORA}, "lrc": {"lrc": LRC, "quantisation": UNNORMED}}.get(adapter, {})
    return StudentSettings(architecture=architecture, quantiser=quantiser, adapter=adapter, **own, **more)


def is_refused(cell: Cell) -> bool:
    return any(all(part in ("*", name) for part, name in zip(entry, cell, strict=True)) for entry in load.REFUSED)


SERVED = [cell for cell in ALL if not is_refused(cell)]


def run(workshop: Workshop, model: Path, root: Path, cell: Cell) -> Path:
    """Two updates on text alone, saved after each."""
    assert run_here(arguments(workshop, model, root, cell)) == loop.DONE
    return root / "run"


def arguments(workshop: Workshop, model: Path, root: Path, cell: Cell) -> list[str]:
    architecture, quantiser, adapter = cell
    given = workshop.settings(
        root, f"student.checkpoint_path={model}", f"student.architecture={architecture}", f"student.adapter={adapter}",
        f"student.quantiser={quantiser}", "teacher=none", "distillation=cross_entropy", "run.steps=2",
        "checkpoint.every=1", "optim.learning_rate=1e-2",
        *OF_ADAPTER[adapter], *(() if quantiser == "none" else OF_LRC if adapter == "lrc" else WARMED),
    )  # fmt: skip
    return [each for each in given if not each.startswith("teacher.")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings and heads that make up the width: every export format has a place for it."""
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tied", num_hidden_layers=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def runs(workshop: Workshop, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Path]:
    return {cell: run(workshop, model, tmp_path_factory.mktemp("cell"), cell) for cell in SERVED}


def trained(folder: Path, cell: Cell) -> Any:
    """The model of the finished run, as `stillhouse-train export` takes it."""
    architecture, quantiser, _ = cell
    settings = StudentSettings(
        architecture=architecture, quantiser=quantiser, checkpoint_path=str(folder), compute="float32"
    )
    return model_of(load_student(settings, CPU)).eval()


def ids() -> torch.Tensor:
    return torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> np.ndarray:
    return model(ids(), use_cache=False).logits.float().numpy()


@pytest.mark.parametrize("cell", SERVED, ids="-".join)
def test_it_trains_and_goes_on_bit_for_bit(
    workshop: Workshop, model: Path, runs: dict[Cell, Path], tmp_path: Path, cell: Cell
) -> None:
    first, last = lines_of(runs[cell])
    assert last["loss"] != first["loss"] and last["grad_norm"] > 0
    shutil.copytree(runs[cell], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    again = run(workshop, model, tmp_path, cell)
    assert trace_of(again) == trace_of(runs[cell])
    assert final_files(again, 2) == final_files(runs[cell], 2)


@pytest.mark.parametrize("cell", SERVED, ids="-".join)
def test_what_was_trained_is_what_its_adapter_says(runs: dict[Cell, Path], model: Path, cell: Cell) -> None:
    """Without one every weight of the model has moved; with one those that it froze are as they were."""
    architecture, quantiser, adapter = cell
    before = load_student(settings_of(cell, checkpoint_path=str(model), compute="float32"), CPU)
    after = load_student(
        StudentSettings(architecture=architecture, quantiser=quantiser, checkpoint_path=str(runs[cell])), CPU
    )
    trains = {name for name, parameter in before.model.named_parameters() if parameter.requires_grad}
    moved = {name for name, old in before.tensors().items() if not torch.equal(old, after.tensors()[name])}
    # SubLN's gains are measured before the first step, whoever is trained then.
    moved -= {name for name in moved - trains if name.endswith("rms_norm.weight")}
    assert trains and moved - {name for name in moved if name.endswith("quantisation_blend")} <= trains
    if adapter == "none":
        assert trains == {name for name, _ in before.model.named_parameters()}
    else:
        assert not any(name.endswith("embed_tokens.weight") for name in trains)
    assert trains == {name for name, parameter in after.model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def exported(runs: dict[Cell, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Cell, str], Any]:
    """By cell and format: the report, or the error that refused it."""
    root, found = tmp_path_factory.mktemp("exports"), {}
    for number, cell in enumerate(SERVED):
        for form in EXPORTS:
            try:
                found[cell, form] = EXPORTS[form](trained(runs[cell], cell), None, root / f"{number}-{form}", CARD)
            except ValueError as error:
                found[cell, form] = error
    return found


@pytest.mark.parametrize("cell", SERVED, ids="-".join)
def test_its_hf_export_is_read_again_to_the_same_logits(
    runs: dict[Cell, Path], exported: dict[tuple[Cell, str], Any], cell: Cell
) -> None:
    """By itself, and as what a student begins with, which goes on training what was trained."""
    architecture, quantiser, adapter = cell
    folder, expected = exported[cell, "hf"].folder, logits(trained(runs[cell], cell))
    if quantiser == "none":
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        again = load_quantised(str(folder))
    # Where int8 rounding meets a tie, the last bit of a sum decides.
    close = 1e-3 if QUANTISERS[quantiser].activations == "none" else 1e-2
    assert compare_logits(expected, logits(again.eval())).difference < close
    settings = StudentSettings(
        architecture=architecture, quantiser=quantiser, checkpoint_path=str(folder), compute="float32"
    )
    student = load_student(settings, CPU)
    assert compare_logits(expected, logits(student.model.eval())).difference < close
    frozen = quantiser != "none" and adapter != "none"
    assert all(parameter.requires_grad for parameter in student.model.parameters()) is not frozen
    for other in QUANTISERS if quantiser != "none" else ():
        if other != quantiser:
            with pytest.raises(ValueError, match=rf"quantised with {quantiser}|with quantiser={quantiser}"):
                load_student(settings.model_copy(update={"quantiser": other}), CPU)


@pytest.mark.parametrize("cell", [cell for cell in SERVED if "packed" in QUANTISERS[cell[1]].exports], ids="-".join)
def test_its_packed_export_is_read_again_to_the_same_logits(
    runs: dict[Cell, Path], exported: dict[tuple[Cell, str], Any], cell: Cell
) -> None:
    folder, model = exported[cell, "packed"].folder, trained(runs[cell], cell)
    np.testing.assert_allclose(logits(load_packed(folder)), logits(model), rtol=0, atol=1e-5)
    read = read_packed(folder)
    assert {name for name, _ in quant_linears(model)} <= {name.removesuffix(".weight") for name in read}


def test_exports_that_stand_alone_give_others_the_same_logits(
    runs: dict[Cell, Path], exported: dict[tuple[Cell, str], Any]
) -> None:
    alone = {
        key: report
        for key, report in exported.items()
        if not isinstance(report, Exception) and report.stands_alone and key[1] != "gguf"
    }
    found = transformers_logits([report.folder for report in alone.values()], ids().numpy())
    # Plain, plain with LoRA, both of bitnet in two formats each, and what quantises weights alone as a dense model.
    assert len(found) >= 9
    for (cell, form), theirs in zip(alone, found, strict=True):
        model = trained(runs[cell], cell)
        comparison = compare_logits(logits(model), theirs)
        assert comparison.difference < 1e-2, (cell, form, comparison)
        if corrections(model):
            # Not because it does nothing: without what the adapter adds they are far away.
            for _, layer in quant_linears(model):
                layer.correction = None
            assert compare_logits(logits(model), theirs).difference > 0.1


@pytest.mark.parametrize("cell", SERVED, ids="-".join)
def test_formats_that_cannot_hold_it_say_why(exported: dict[tuple[Cell, str], Any], cell: Cell) -> None:
    architecture, quantiser, adapter = cell
    for form in EXPORTS:
        outcome = exported[cell, form]
        if form == "sdar":
            assert isinstance(outcome, CannotExpressError) and "SDAR's form cannot express this student" in str(outcome)
        elif form not in QUANTISERS[quantiser].exports:
            assert f"format {form} can't hold this student (student.quantiser is {quantiser}): use" in str(outcome)
        elif form == "dense" and QUANTISERS[quantiser].activations != "none":
            reason = "rounded to int8" if adapter == "lrc" else "the student has SubLN"
            assert isinstance(outcome, CannotExpressError) and reason in str(outcome)
        elif form == "gguf" and architecture == "diffusion":
            assert isinstance(outcome, CannotExpressError) and "from left to right, not by blocks" in str(outcome)
        elif form == "gguf" and adapter != "none":
            reason = "sub_norm 'none'" if adapter == "lrc" else "adapter in full precision"
            assert isinstance(outcome, CannotExpressError) and reason in str(outcome)
        else:
            assert not isinstance(outcome, Exception), outcome


@pytest.mark.parametrize("cell", [cell for cell in ALL if cell not in SERVED] or [None], ids=str)
def test_refused_cells_say_why(cell: Cell | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if cell is not None:
        with pytest.raises(ValueError, match="is not supported: "):
            check_cell(settings_of(cell))
    taken = SERVED[-1]
    check_cell(settings_of(taken))
    for entry in (taken, ("*", taken[1], taken[2])):
        monkeypatch.setattr(load, "REFUSED", {entry: "there is nothing to correct"})
        with pytest.raises(ValueError, match="is not supported: there is nothing to correct") as caught:
            check_cell(settings_of(taken))
        assert f"quantiser {taken[1]}, adapter {taken[2]}" in str(caught.value)
        check_cell(settings_of(SERVED[0]))


@pytest.mark.parametrize("part", ["architecture", "quantiser", "adapter"])
def test_a_name_that_is_in_no_dict_is_refused_with_those_that_are(part: str) -> None:
    with pytest.raises(ValueError, match=rf"student\.{part} is thing, expected one of: ") as caught:
        check_cell(StudentSettings(**{part: "thing"}))
    known = {"architecture": ARCHITECTURES, "quantiser": QUANTISERS, "adapter": ADAPTERS}[part]
    assert all(name in str(caught.value) for name in known)


@pytest.mark.parametrize("cell", SERVED, ids="-".join)
def test_check_says_which_student_would_be_trained(
    workshop: Workshop, model: Path, tmp_path: Path, cell: Cell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(arguments(workshop, model, tmp_path, cell)) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    architecture, quantiser, adapter = cell
    bits = f"{QUANTISERS[quantiser].bits:g} bits per linear weight"
    assert f"architecture {architecture}, quantiser {quantiser}, adapter {adapter}: {bits}" in said

"""The closed form of a student's corrections over a run's data: against least squares, against the model that was
quantised, resumed to the same bits, and as the start of a training run.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from student_trainer import loop
from student_trainer.batch.batch import Batch
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import CausalDocuments, View
from student_trainer.calibration import layer_files
from student_trainer.calibration.calibrate import calibrate
from student_trainer.calibration.start import calibrate_at_start
from student_trainer.calibration.sub_norms import untrained_sub_norms
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.compose import compose
from student_trainer.ranks import ALONE
from student_trainer.settings import LRCSettings, QuantisationSettings, StudentSettings
from student_trainer.students.adapters.low_rank import LowRank, check_start, corrections
from student_trainer.students.adapters.lrc import rank_of, uncalibrated
from student_trainer.students.quant_linear import QuantLinear, quant_linears
from student_trainer.students.student import Student
from tests.models import save_tiny_llama
from tests.trainer_run import (
    ScriptedTargets,
    TrainerProcess,
    Workshop,
    final_files,
    lines_of,
    run_here,
    trace_of,
    train,
)
from tests.unit.trainer.test_align import batch_of

CPU = torch.device("cpu")
RTN = ("student=lrc", "student.quantisation.bits=2", "student.lrc.sequences=8", "student.lrc.rank=0.2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3)


def student_of(model: Path, quantiser: str = "rtn", activations: int | None = None, **lrc: Any) -> Student:
    bits = 2 if quantiser == "rtn" else None
    rounded = {"quantise_activations": activations is not None, "activation_bits": activations}
    quantisation = QuantisationSettings(sub_norm="none", bits=bits, **rounded)
    settings = StudentSettings(
        quantiser=quantiser, adapter="lrc", checkpoint_path=str(model), compute="float32", quantisation=quantisation,
        lrc=LRCSettings(**lrc),
    )  # fmt: skip
    return load_student(settings, CPU)


def text(rows: int = 24, length: int = 48, parts: int = 3) -> list[MicroBatch]:
    """Random tokens, two documents a row, and some padding, in micro batches."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(parts):
        ids_BT = torch.randint(300, (rows // parts, length), generator=generator)
        documents_BT = torch.zeros_like(ids_BT, dtype=torch.int32)
        documents_BT[:, length // 2 :], documents_BT[:, -4:] = 1, -1
        positions_BT = torch.arange(length).expand_as(ids_BT)
        rows_N = (documents_BT >= 0).flatten().nonzero().flatten()
        view = View(ids_BT, positions_BT, CausalDocuments(documents_BT), rows_N, ids_BT.flatten()[rows_N],
                    torch.arange(len(rows_N)))  # fmt: skip
        made.append(MicroBatch(view, torch.zeros(len(rows_N)).long(), torch.zeros(len(rows_N)).long(), None))
    return made


def calibrated(
    model: Path, folder: Path, quantiser: str = "rtn", activations: int | None = None, **lrc: Any
) -> tuple[Student, dict[str, tuple[float, float]]]:
    student = student_of(model, quantiser, activations, **lrc)
    return student, calibrate(student, text(), LRCSettings(**lrc), folder, "digest")


@torch.no_grad()
def logits(student: Student) -> Tensor:
    return torch.cat([student.logits(micro) for micro in text()])


@torch.no_grad()
def inputs_of(student: Student, layer: QuantLinear) -> Tensor:
    """What the layer reads of the text, without padding."""
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    for micro in text():
        student.hidden(micro)
    hook.remove()
    real = torch.cat([micro.view.attention.document_ids_BT.flatten() >= 0 for micro in text()])
    return torch.cat(found)[real].double()


def test_of_full_rank_and_with_exact_activations_it_gives_the_model_back(model: Path, tmp_path: Path) -> None:
    plain = student_of(model)
    student, errors = calibrated(model, tmp_path, rank=1.0, damping=0.0)
    exact = load_student(StudentSettings(checkpoint_path=str(model), compute="float32"), CPU)
    gap, before = (logits(student) - logits(exact)).norm(), (logits(plain) - logits(exact)).norm()
    assert gap < 1e-3 * before
    assert all(after < 1e-6 * before for before, after in errors.values())


@pytest.mark.parametrize("reference", ["full_precision", "same_inputs"])
@pytest.mark.parametrize("activations", [None, 8, 4])
def test_every_correction_is_the_least_squares_optimum_of_its_final_inputs(
    model: Path, tmp_path: Path, reference: str, activations: int | None
) -> None:
    """Of the inputs as they are in the finished student: each was solved with all before it corrected."""
    student, errors = calibrated(model, tmp_path, activations=activations, reference=reference, rank=1.0, damping=0.0)
    exact = load_student(StudentSettings(checkpoint_path=str(model), compute="float32"), CPU)
    one = torch.ones(())
    for name, layer in quant_linears(student.model):
        x_NI = inputs_of(student, layer)
        wanted = exact.model.get_submodule(name)
        reads = inputs_of(exact, wanted) if reference == "full_precision" else x_NI  # type: ignore[arg-type]
        rounds = layer.activation_quantiser
        y_NI = x_NI if rounds is None else rounds(x_NI.float(), one).double()
        hat_OI = layer.weight_quantiser.weight(layer, one).detach().double()
        r_NO = F.linear(reads, wanted.weight.detach().double()) - F.linear(y_NI, hat_OI)
        best = torch.linalg.lstsq(x_NI, r_NO, driver="gelsd").solution
        assert isinstance(layer.correction, LowRank)
        found_NO = F.linear(F.linear(x_NI, layer.correction.lora_A.weight.double()),
                            layer.correction.lora_B.weight.double()).detach()  # fmt: skip
        left, least = (r_NO - found_NO).pow(2).sum().item(), (r_NO - x_NI @ best).pow(2).sum().item()
        square = r_NO.pow(2).sum().item()
        assert left - least <= 1e-6 * square, (name, left, least, square)
        assert errors[name] == pytest.approx((square, least), rel=1e-4, abs=1e-6 * square)


@pytest.mark.parametrize("quantiser", ["rtn", "bitnet"])
@pytest.mark.parametrize("reference", ["full_precision", "same_inputs"])
def test_no_layer_is_worse_for_it_and_more_rank_is_nearer_to_the_model(
    model: Path, tmp_path: Path, quantiser: str, reference: str
) -> None:
    exact = logits(load_student(StudentSettings(checkpoint_path=str(model), compute="float32"), CPU)).log_softmax(-1)

    def kl(student: Student) -> float:
        return float(F.kl_div(logits(student).log_softmax(-1), exact, log_target=True, reduction="batchmean"))

    without = kl(student_of(model, quantiser))
    found = []
    for rank in (0.05, 0.2, 0.5, 1.0):
        student, errors = calibrated(model, tmp_path / str(rank), quantiser, rank=rank, reference=reference)
        assert all(after <= before for before, after in errors.values())
        assert set(errors) == {name for name, _ in quant_linears(student.model)}
        ranks = {name: len(each.a_RI) for name, each in corrections(student.model).items()}
        assert ranks == {name: rank_of(layer, rank) for name, layer in quant_linears(student.model)}
        found.append(kl(student))
    assert without > found[0] > found[1] > found[2] > found[3]


def test_the_first_layer_alone_shows_that_errors_fall_with_rank(model: Path, tmp_path: Path) -> None:
    """Its inputs are the same whatever the rank is, so that its errors may be compared."""
    name = "model.layers.0.self_attn.q_proj"
    after = [calibrated(model, tmp_path / str(rank), rank=rank)[1][name][1] for rank in (0.02, 0.1, 0.3, 0.7, 1.0)]
    assert after == sorted(after, reverse=True) and len(set(after)) == 5


class Interrupted(Exception):
    pass


def test_a_calibration_that_was_stopped_goes_on_to_the_same_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, errors = calibrated(model, tmp_path / "straight", rank=0.3)
    real = layer_files.LayerFiles.write

    def write(self: Any, number: int, found: Any) -> None:
        real(self, number, found)
        if number == 1:
            raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(layer_files.LayerFiles, "write", write)
        calibrated(model, tmp_path / "stopped", rank=0.3)
    assert len(list((tmp_path / "stopped").glob("layer-*.safetensors"))) == 2
    caplog.set_level("INFO")
    again, errors_again = calibrated(model, tmp_path / "stopped", rank=0.3)
    assert "2 of 3 layers were kept from an earlier start" in caplog.text
    assert errors_again == errors
    for name, found in corrections(student.model).items():
        other = corrections(again.model)[name]
        assert torch.equal(found.a_RI, other.a_RI) and torch.equal(found.b_OR, other.b_OR), name


def test_files_of_other_settings_or_damaged_ones_are_not_used(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibrated(model, tmp_path, rank=0.3)
    student = student_of(model, rank=0.1)
    calibrate(student, text(), LRCSettings(rank=0.1), tmp_path, "another")
    assert "is from a calibration with other settings or data: recomputing it" in caplog.text
    assert not uncalibrated(student.model)
    (tmp_path / "layer-00000.safetensors").write_bytes(b"no tensors")
    again = student_of(model, rank=0.1)
    calibrate(again, text(), LRCSettings(rank=0.1), tmp_path, "another")
    assert "cannot be read" in caplog.text
    for name, found in corrections(student.model).items():
        assert torch.equal(found.b_OR, corrections(again.model)[name].b_OR)


def test_what_the_student_is_for_its_run_is_as_it_was(model: Path, tmp_path: Path) -> None:
    """Training mode, blends, hooks, and a layer's own forward: calibrating leaves corrections and nothing else."""
    student = student_of(model)
    before = {name: tensor.clone() for name, tensor in student.tensors().items()}
    calibrate(student, text(), LRCSettings(), tmp_path, "digest")
    assert student.model.training
    for name, tensor in student.tensors().items():
        assert (".correction." in name) or torch.equal(tensor, before[name]), name
    for module in student.model.modules():
        assert "forward" not in vars(module) and not module._forward_pre_hooks


def test_too_little_text_is_refused_without_damping(model: Path, tmp_path: Path) -> None:
    student = student_of(model, damping=0.0)
    few = text(rows=1, length=12, parts=1)
    with pytest.raises(ValueError, match="span fewer than their 64 dimensions: use more tokens"):
        calibrate(student, few, LRCSettings(damping=0.0), tmp_path, "digest")


@pytest.mark.parametrize(
    ("quantiser", "more", "words"),
    [
        ("bitnet", {}, "sub_norm=none, or student.lrc.start=random"),
        ("rtn", {"quantisation": QuantisationSettings(warmup_steps=3)}, "leave out student.quantisation.warmup_steps"),
        ("rtn", {"lrc": LRCSettings(targets=("w_pack",))}, "student.lrc.targets: no quantised linear is named w_pack"),
        ("none", {}, "lrc corrects the error of quantised layers"),
    ],
)
def test_what_has_no_closed_form_is_refused(model: Path, quantiser: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_student(StudentSettings(quantiser=quantiser, adapter="lrc", checkpoint_path=str(model), **more), CPU)


def test_factors_that_both_start_at_zero_never_learn_and_are_refused(model: Path) -> None:
    student = student_of(model, start="random")
    for _, layer in quant_linears(student.model):
        assert isinstance(layer.correction, LowRank)
        layer.correction.lora_A.weight.data.zero_()
    with pytest.raises(ValueError, match=r"both factors of the correction of .*q_proj are zero: neither would ever"):
        check_start(student.model)
    for micro in text(parts=1):
        student.hidden(micro).square().sum().backward()
    gradients = [p.grad for p in student.model.parameters() if p.requires_grad]
    assert gradients and not any(gradient.any() for gradient in gradients if gradient is not None)
    proper = student_of(model, start="random")
    for micro in text(parts=1):
        proper.hidden(micro).square().sum().backward()
    assert all(layer.correction.lora_B.weight.grad.any() for _, layer in quant_linears(proper.model))  # type: ignore


def run(workshop: Workshop, root: Path, *overrides: str) -> Path:
    given = workshop.settings(root, *RTN, "optim.learning_rate=1e-2", "evaluation.every=6", *overrides)
    assert run_here(given, ScriptedTargets()) == loop.DONE
    return root / "run"


@pytest.fixture(scope="module")
def closed(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(workshop, tmp_path_factory.mktemp("closed"))


def test_both_starts_are_trained_and_all_else_is_frozen(workshop: Workshop, closed: Path, tmp_path: Path) -> None:
    for folder in (closed, run(workshop, tmp_path, "student.lrc.start=random")):
        first, *_, last = lines_of(folder, "evaluation.jsonl")
        for source in ("a", "b"):
            assert last[source]["kl"] < first[source]["kl"]
        path = str(workshop.student)
        before = load_student(StudentSettings(checkpoint_path=path, compute="float32"), CPU).tensors()
        after = load_student(StudentSettings(checkpoint_path=str(folder), quantiser="rtn"), CPU)
        assert all(torch.equal(after.tensors()[name], tensor) for name, tensor in before.items())
        assert not uncalibrated(after.model)
    errors = json.loads((closed / "calibration" / "errors.json").read_text())
    assert len(errors) == 7 and all(each["after"] < each["before"] for each in errors.values())
    assert not (tmp_path / "run" / "calibration").exists()


def test_a_run_resumes_bit_for_bit_and_does_not_calibrate_again(
    workshop: Workshop, closed: Path, tmp_path: Path
) -> None:
    shutil.copytree(closed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    shutil.rmtree(tmp_path / "run" / "calibration")
    again = run(workshop, tmp_path)
    assert trace_of(again) == trace_of(closed)
    assert final_files(again, 12) == final_files(closed, 12)
    assert not (again / "calibration").exists()


class Prompts:
    """A source of rows of which nothing is learnt."""

    def initial_state(self) -> None:
        return None

    def batch(self, state: None, number: int) -> tuple[Batch, None]:
        lengths = [[20, 28], [48]]
        masks = {(row, at): [False] * length for row, of_row in enumerate(lengths) for at, length in enumerate(of_row)}
        return batch_of(*lengths, seq_len=48, masks=masks), state


def test_text_of_which_nothing_is_learnt_is_text_to_calibrate_on(workshop: Workshop, tmp_path: Path) -> None:
    """As a rank's rows may be, however much is learnt on other ranks."""
    for name, more in (("lrc", RTN), ("norms", ("student.quantiser=bitnet",))):
        arguments = workshop.settings(tmp_path / name, *more, "optim.micro_batch_rows=1", "data.rows=2")
        settings = compose(arguments)
        student = load_student(settings.student, CPU)
        calibrate_at_start(settings, student, Prompts(), {}, tmp_path / name, ALONE)  # type: ignore[arg-type]
        assert not uncalibrated(student.model) and not untrained_sub_norms(student.model)


def test_checkpointed_activations_work_with_frozen_embeddings(workshop: Workshop, closed: Path, tmp_path: Path) -> None:
    again = run(workshop, tmp_path, "student.gradient_checkpointing=true")
    assert trace_of(again) == trace_of(closed)


def test_a_run_of_no_steps_calibrates_and_saves(workshop: Workshop, closed: Path, tmp_path: Path) -> None:
    folder = run(workshop, tmp_path, "run.steps=0")
    first = lines_of(closed, "evaluation.jsonl")[0]
    assert [{**line, "time": 0} for line in lines_of(folder, "evaluation.jsonl")] == [{**first, "time": 0}]
    student = load_student(StudentSettings(checkpoint_path=str(folder), quantiser="rtn"), CPU)
    assert not uncalibrated(student.model)
    run(workshop, tmp_path, "run.steps=0")  # there is nothing to do, and that is no error


def slowly() -> None:
    real = layer_files.LayerFiles.write

    def write(self: Any, number: int, found: Any) -> None:
        real(self, number, found)
        time.sleep(60.0)

    layer_files.LayerFiles.write = write  # type: ignore[method-assign]


def test_a_signal_ends_it_at_once_and_a_second_start_goes_on(model: Path, workshop: Workshop, tmp_path: Path) -> None:
    alone = [each for each in workshop.settings(
        tmp_path, *RTN, f"student.checkpoint_path={model}", "teacher=none", "distillation=cross_entropy", "run.steps=1"
    ) if not each.startswith("teacher.")]  # fmt: skip
    done = tmp_path / "run" / "calibration" / "layer-00000.safetensors"
    with TrainerProcess(alone, tmp_path / "first.txt", slowly) as trainer:
        for _ in range(600):
            if done.exists() or not trainer.running:
                break
            time.sleep(0.1)
        assert done.exists(), trainer.text
        began = time.monotonic()
        trainer.signal(signal.SIGTERM)
        assert trainer.wait() == 75, trainer.text
        assert time.monotonic() - began < 5.0
    assert train(alone, tmp_path / "second.txt") == 0
    assert "1 of 3 layers were kept from an earlier start" in (tmp_path / "second.txt").read_text()
    straight = [each.replace(str(tmp_path), str(tmp_path / "straight")) if each.startswith("run.root") else each
                for each in alone]  # fmt: skip
    assert train(straight, tmp_path / "third.txt") == 0
    assert final_files(tmp_path / "straight" / "run", 1) == final_files(tmp_path / "run", 1)

"""`student=bitnet` in whole runs: warm-up, exact resume, stages that follow by a path, muon_clip, other sources."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from student_trainer import loop
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.compose import compose
from student_trainer.settings import LoRASettings, StudentSettings
from student_trainer.students.load import merged
from student_trainer.students.quant_linear import quant_linears, quantisation_blend
from student_trainer.students.student import Student
from teacher_proto.process.stopping import StopSignals
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, run_here, steps_of, trace_of, train
from tests.unit.students.tiny import tiny_model

BITNET = ("student=bitnet", "student.bitnet.warmup_steps=6")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stage2(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of continued pre-training."""
    root = tmp_path_factory.mktemp("stage2")
    recipe = ("recipe=bitnet_pretraining", "student.bitnet.warmup_steps=6", "evaluation.every=6")
    arguments = [each for each in workshop.settings(root, *recipe) if not each.startswith("teacher.")]
    assert run_here(arguments) == loop.DONE
    return root / "run"


def blend_at(run: Path, step: int) -> float:
    tensors = load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    (blend,) = {float(value) for name, value in tensors.items() if name.endswith("quantisation_blend")}
    return blend


def test_a_run_warms_up_and_learns(stage2: Path) -> None:
    lines = lines_of(stage2)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    # Checkpoints keep the blend of the last update made: step n is number n - 1.
    assert blend_at(stage2, 12) == 1.0
    assert blend_at(stage2, 8) == 1.0


@pytest.mark.parametrize("step", [3, 7])
def test_a_run_stopped_in_or_after_its_warmup_is_the_straight_run(
    workshop: Workshop, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopAt(StopSignals):
        def check(self) -> None:
            if steps_of(tmp_path / "run")[-1:] == [step]:
                raise self.Stop("a test stopped the run")

    arguments = workshop.settings(tmp_path, *BITNET)
    straight = tmp_path / "straight"
    assert run_here([*arguments, f"run.root={straight}"], ScriptedTargets()) == loop.DONE
    with monkeypatch.context() as patched:
        patched.setattr("teacher_proto.process.stopping.StopSignals", StopAt)
        assert run_here(arguments, ScriptedTargets()) == loop.STOPPED
    assert blend_at(tmp_path / "run", step) == pytest.approx(min(1.0, (step - 1) / 6))
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert trace_of(tmp_path / "run") == trace_of(straight / "run")
    assert final_files(tmp_path / "run", 12) == final_files(straight / "run", 12)


def test_one_stage_follows_another_by_a_path(workshop: Workshop, stage2: Path, tmp_path: Path) -> None:
    arguments = workshop.settings(
        tmp_path, "student=bitnet", f"student.checkpoint_path={stage2}", "evaluation.every=6", "run.steps=6"
    )
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    last, first = lines_of(stage2, "evaluation.jsonl")[-1], lines_of(tmp_path / "run", "evaluation.jsonl")[0]
    for source in "ab":
        assert first[source]["cross_entropy"] == pytest.approx(last[source]["cross_entropy"], abs=1e-6)
    # And a third after the second: the chain ends at the model, where the tokenizer is.
    third = workshop.settings(
        tmp_path / "third", "student=bitnet", f"student.checkpoint_path={tmp_path / 'run'}", "run.steps=1"
    )
    assert run_here(third, ScriptedTargets()) == loop.DONE


def test_a_full_precision_run_can_be_made_ternary(workshop: Workshop, straight: Path) -> None:
    plain = load_student(StudentSettings(checkpoint_path=str(straight)), CPU)
    ternary = load_student(StudentSettings(quantiser="bitnet", checkpoint_path=str(straight)), CPU)
    assert len(list(quant_linears(ternary.model))) == 7 and quantisation_blend(ternary.model) == 1.0
    ours, theirs = ternary.tensors(), plain.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    trained = load_file(straight / "checkpoints" / "step-00000012" / "model.safetensors")
    assert all(torch.equal(theirs[name], trained[name]) for name in theirs)


def test_what_a_run_left_must_fit_what_is_asked(stage2: Path, workshop: Workshop, tmp_path: Path) -> None:
    def settings(**ternary: object) -> StudentSettings:
        return StudentSettings(kind="bitnet", checkpoint_path=str(stage2), bitnet=ternary)

    assert load_student(settings(sub_norm="output", eps=1e-8), CPU)
    with pytest.raises(ValueError, match=r"quantisation.sub_norm is all, .* was trained with output: leave it out"):
        load_student(settings(sub_norm="all"), CPU)
    with pytest.raises(ValueError, match=r"trained a student with quantiser bitnet, but student.quantiser is none"):
        load_student(StudentSettings(checkpoint_path=str(stage2)), CPU)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.yaml").write_text("{}")
    with pytest.raises(ValueError, match=r"saved no checkpoint yet"):
        load_student(StudentSettings(quantiser="bitnet", checkpoint_path=str(tmp_path / "run")), CPU)
    with pytest.raises(ValueError, match=r"student.checkpoint_path=/nowhere"):
        load_student(StudentSettings(quantiser="bitnet", checkpoint_path="/nowhere"), CPU)
    with pytest.raises(ValueError, match="would never be fully quantised"):
        compose(workshop.settings(tmp_path, "student=bitnet", "student.bitnet.warmup_steps=12"))


@pytest.mark.parametrize("quantised", [True, False])
def test_transformers_own_bitnet_checkpoints_are_students(tmp_path: Path, quantised: bool) -> None:
    model = tiny_model("bitnet")
    if quantised:
        model.config.quantization_config = {"quant_method": "bitnet", "quantization_mode": "online"}
    model.save_pretrained(tmp_path)
    student = load_student(StudentSettings(quantiser="bitnet", checkpoint_path=str(tmp_path)), CPU)
    assert len(list(quant_linears(student.model))) == 14 and quantisation_blend(student.model) == 1.0


def test_muon_clip_trains_ternary_layers_through_the_front_door(workshop: Workshop, tmp_path: Path) -> None:
    """The whole matrix is scaled where attention is clipped: ternary codes stay what they are."""
    arguments = workshop.settings(
        tmp_path, "student=bitnet", "teacher=none", "distillation=cross_entropy", "optim=muon_clip",
        "optim.qk_clip.tau=0.3", "optim.learning_rate=0.02", "prefetch.depth=0",
    )  # fmt: skip
    arguments = [each for each in arguments if not each.startswith("teacher.")]
    assert train(arguments, tmp_path / "output") == 0, (tmp_path / "output").read_text()
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert any(line["attention/clipped_heads"] > 0 for line in lines)


def test_settings_of_a_ternary_student_warn_beside_another(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="student.quantisation.sub_norm has no effect: student.quantiser is none"):
        compose(workshop.settings(tmp_path, "student.bitnet.sub_norm=all"))


LORA = ("student=bitnet", "student.lora.rank=3", "student.lora.alpha=6", "optim.learning_rate=3e-2")


@pytest.fixture(scope="module")
def adapted(workshop: Workshop, stage2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on the ternary student of an earlier run."""
    root = tmp_path_factory.mktemp("adapted")
    arguments = workshop.settings(root, *LORA, f"student.checkpoint_path={stage2}")
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    return root / "run"


def loaded(path: Path, **more: object) -> Student:
    return load_student(StudentSettings(quantiser="bitnet", checkpoint_path=str(path), **more), CPU)


def test_lora_on_a_ternary_student_trains_its_additions_alone(stage2: Path, adapted: Path) -> None:
    base, after = loaded(stage2).tensors(), loaded(adapted)
    assert all(torch.equal(after.tensors()[name], tensor) for name, tensor in base.items())
    additions = {name for name, parameter in after.model.named_parameters() if parameter.requires_grad}
    assert len(additions) == 2 * 7 and all(".correction.lora_" in name for name in additions)
    assert all(bool(after.tensors()[name].any()) for name in additions)
    losses = [line["loss"] for line in lines_of(adapted)]  # of other batches each
    assert sum(losses[6:]) < sum(losses[:6]), losses
    assert quantisation_blend(after.model) == 1.0


def test_a_run_after_a_lora_run_goes_on_with_its_additions_and_no_others(
    workshop: Workshop, adapted: Path, tmp_path: Path
) -> None:
    arguments = workshop.settings(tmp_path, "student=bitnet", f"student.checkpoint_path={adapted}", "run.steps=1")
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    before, after = loaded(adapted).tensors(), loaded(tmp_path / "run").tensors()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if ".correction.lora_" in name
    }
    again = LoRASettings(rank=3, alpha=6)
    for path in (adapted, tmp_path / "run"):  # the second has them from the first
        assert loaded(path, lora=again).adapted is not None
        with pytest.raises(
            ValueError, match=r"trained an adapter lora with .*rank=3.*, but the settings request .*rank=5"
        ):
            loaded(path, lora=LoRASettings(rank=5))
    with pytest.raises(ValueError, match="can't be merged into a weight that is quantised with bitnet"):
        merged(loaded(adapted))


def test_a_lora_run_that_is_made_ternary_may_have_lora_again(workshop: Workshop, tmp_path: Path) -> None:
    arguments = workshop.settings(tmp_path, "student.lora.rank=4", "run.steps=2", "optim.learning_rate=3e-2")
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    plain = merged(load_student(StudentSettings(checkpoint_path=str(tmp_path / "run")), CPU)).state_dict()
    ternary = loaded(tmp_path / "run", lora=LoRASettings(rank=2))
    assert all(torch.equal(ternary.tensors()[name], tensor) for name, tensor in plain.items())
    assert {len(tensor) for name, tensor in ternary.tensors().items() if name.endswith("lora_A.weight")} == {2}


def test_targets_of_lora_on_a_ternary_student_are_chosen_by_name(workshop: Workshop, stage2: Path) -> None:
    student = loaded(stage2, lora=LoRASettings(rank=2, targets=("q_proj", "mlp.down_proj")))
    names = {name for name, layer in quant_linears(student.model) if layer.correction is not None}
    assert names == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"}
    with pytest.raises(ValueError, match=r"student\.lora\.targets: no quantised linear is named w_pack or proj"):
        loaded(stage2, lora=LoRASettings(rank=2, targets=("w_pack", "proj")))

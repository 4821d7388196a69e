"""Which kind of student a folder holds, and the folders of other trainers of block-diffusion models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AddedToken, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from student_trainer import loop
from student_trainer.checkpoint.earlier_run import load_student, recognised
from student_trainer.cli.check import main as check
from student_trainer.cli.compose import compose
from student_trainer.cli.export import main as export
from student_trainer.settings import DiffusionSettings, StudentSettings
from student_trainer.students.diffusion_record import DiffusionRecord
from student_trainer.students.student import Student
from tests.models import VOCAB_SIZE, save_tiny_llama, tiny_tokenizer
from tests.trainer_run import ScriptedTargets, Workshop, run_here

CPU = torch.device("cpu")
MASK = VOCAB_SIZE - 1


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def save_qwen3(folder: Path, **config: Any) -> Path:
    """A tiny Qwen3 whose config.json is rewritten with these entries; None takes one out."""
    shape = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, rope_theta=1000000.0, tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(shape).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return rewrite(folder, **config)


def rewrite(folder: Path, **config: Any) -> Path:
    file = folder / "config.json"
    entries = json.loads(file.read_text()) | config
    file.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))
    return folder


def name_mask(folder: Path, token: str) -> int:
    """Write the tokenizer with one more token, the last of the vocabulary's rows that it has."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return int(tokenizer.convert_tokens_to_ids(token))


def student_of(folder: Path, **diffusion: Any) -> Student:
    settings = DiffusionSettings(**diffusion)
    path = StudentSettings(
        checkpoint_path=str(folder), compute="float32", architecture="diffusion", diffusion=settings
    )  # fmt: skip
    return load_student(path, CPU)


SDAR = {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "rope_parameters": None, "rope_theta": 1e6,
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}}  # fmt: skip


def test_an_sdar_folder_is_read_as_what_it_computes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = save_qwen3(tmp_path / "sdar", **SDAR, block_size=8, mask_token_id=MASK)
    student = student_of(folder)
    assert student.reader.record == DiffusionRecord(8, MASK, "in_place", "block_causal")  # type: ignore[attr-defined]
    assert "is a block-diffusion model of another trainer: blocks of 8, mask token 511, in_place" in caplog.text
    assert type(student.model) is Qwen3ForCausalLM
    assert student.config.rope_parameters["rope_theta"] == 1e6  # 10,000 where it is read under its other name
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(student.tensors()[name], tensor), name
    assert not hasattr(student.config, "block_size") and not hasattr(student.config, "auto_map")
    with pytest.raises(ValueError, match="family is token_shift, but the checkpoint was trained with in_place"):
        student_of(folder, family="token_shift")


def test_sdars_4b_folder_says_neither_block_nor_mask_token(tmp_path: Path) -> None:
    """They are its architecture's then; this tiny one has no such row."""
    folder = save_qwen3(tmp_path / "sdar", **SDAR)
    with pytest.raises(ValueError, match="mask token is 151669, but it has embeddings of 512 tokens"):
        student_of(folder)


def test_a_fast_dllm_folder_names_its_mask_in_the_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = save_qwen3(tmp_path / "fast", bd_size=32)
    with pytest.raises(ValueError, match=r"without a mask token: .*set student.diffusion.mask_token_id"):
        student_of(folder)
    assert student_of(folder, mask_token_id=500).reader.record.mask_token_id == 500  # type: ignore[attr-defined]
    named = name_mask(folder, "|<MASK>|")
    record = student_of(folder).reader.record  # type: ignore[attr-defined]
    assert record == DiffusionRecord(32, named, "token_shift", "block_causal")
    assert f"blocks of 32, mask token {named} (|<MASK>| of its tokenizer), token_shift" in caplog.text


SHAPES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "sft": (
        {"bd_size": 8, "mask_token": "|<MASK>|", "mask_token_id": MASK, "num_diffusion_steps": 8, "training_loss": 2.0,
         "training_method": "fast-dllm-v2-sft", "max_seq_length": 512},
        (8, MASK, "token_shift"),
    ),
    "objective": (
        {"mask_token_id": MASK, "mask_prob": 0.15, "ignore_index": -100, "use_complementary_masks": True,
         "training_method": "fast-dllm-v2"},
        (16, MASK, "token_shift"),
    ),
    "unified": (
        {"mask_token_id": MASK, "mask_prob": 0.15, "ignore_index": -100, "training_method": "unified-dlm"},
        (16, MASK, "in_place"),
    ),
    "converter": (
        {"block_size": 4, "num_diffusion_steps": 8, "noise_schedule": "cosine", "source_model": "x", "is_bitnet": True},
        (4, None, "token_shift"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_dlm_config_is_read(tmp_path: Path, shape: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    given, (block, mask, family) = SHAPES[shape]
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    (folder / "dlm_config.json").write_text(json.dumps(given))
    mask = name_mask(folder, "<|mask|>") if mask is None else mask
    record = student_of(folder).reader.record  # type: ignore[attr-defined]
    assert record == DiffusionRecord(block, mask, family, "block_causal")
    said = "(which it does not specify)" in caplog.text
    assert said is not any(name in given for name in ("bd_size", "block_size"))
    with pytest.raises(ValueError, match=r"holds a block-diffusion student, but student\.architecture is"):
        load_student(StudentSettings(checkpoint_path=str(folder)), CPU)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1]", "its dlm_config.json holds list, expected an object of names and values"),
        ("{", "its dlm_config.json is not valid JSON"),
        ({"bd_size": 8, "block_size": 4, "mask_token_id": 3}, "block_size of dlm_config.json is 4: expected one size"),
        (
            {"bd_size": 8, "mask_token_id": 3, "training_method": "mdlm"},
            "training_method .* is 'mdlm', expected one of",
        ),
        ({"bd_size": 128, "mask_token_id": 3}, "block_size: got 128, expected a whole number from 1 to 64"),
        ({"bd_size": 8, "mask_token_id": "x"}, "mask_token_id: got 'x'"),
        ({"bd_size": 8}, "a block-diffusion model without a mask token"),
        ({"bd_size": 8, "mask_token_id": 4000}, "mask token is 4000, but it has embeddings of 512"),
    ],
)
def test_a_bad_dlm_config_is_refused(tmp_path: Path, given: Any, message: str) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    (folder / "dlm_config.json").write_text(given if isinstance(given, str) else json.dumps(given))
    with pytest.raises(ValueError, match=message):
        student_of(folder)


def test_the_kind_goes_by_the_name_that_others_give_it() -> None:
    for kind, cell in {
        "dlm": ("diffusion", "none"), "bitnet": ("causal", "bitnet"), "causal": ("causal", "none"),
        "auto": ("auto", "auto"),
    }.items():  # fmt: skip
        student = compose([f"student.type={kind}"]).student
        assert (student.architecture, student.quantiser) == cell
    both = compose(["student.type=dlm", "student.quantiser=bitnet", "student.diffusion.masks=suffix"]).student
    assert (both.architecture, both.quantiser) == ("diffusion", "bitnet")
    with pytest.raises(ValueError, match=r"student\.type is moe, expected one of: causal, bitnet, dlm, auto"):
        compose(["student.type=moe"])


def test_auto_tells_the_three_apart_and_says_so(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model, a run, and what was exported of one; a run goes on that began so."""
    caplog.set_level(logging.INFO)

    def found(path: Path, *more: str) -> tuple[str, str]:
        settings = recognised(compose(["student.type=auto", f"student.checkpoint_path={path}", *more]))
        return settings.student.architecture, settings.student.quantiser

    assert found(workshop.student) == ("causal", "none")
    assert "is a llama model that reads from left to right, in full precision: student.architecture=" in caplog.text
    for name, more, cell in (
        ("bits", ("student.type=bitnet",), ("causal", "bitnet")),
        ("both", ("student.type=dlm", "student.quantiser=bitnet", "student.diffusion.block_size=4"),
         ("diffusion", "bitnet")),
    ):  # fmt: skip
        arguments = workshop.settings(tmp_path / name, "run.steps=1", "distillation=cross_entropy", *more)
        assert run_here(arguments, ScriptedTargets()) == loop.DONE
        run = tmp_path / name / "run"
        assert export([str(run), "--format", "hf", "--skip-check"]) == 0
        assert found(run) == found(run / "exports" / "hf") == cell
    assert "that fills in blocks of 4, quantised with bitnet" in caplog.text
    assert found(run, "student=bitnet") == ("diffusion", "bitnet")
    folder = save_qwen3(tmp_path / "sdar", **SDAR, block_size=8, mask_token_id=MASK)
    assert found(folder) == ("diffusion", "none")
    arguments = workshop.settings(
        tmp_path / "auto", "run.steps=1", "student.type=auto", "student.checkpoint_path=" + str(folder)
    )
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert run_here([*arguments, "run.steps=1"], ScriptedTargets()) == loop.DONE
    capsys.readouterr()
    assert check([*arguments, "teacher=none", "distillation=cross_entropy"]) == 0
    assert "architecture diffusion, quantiser none" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"student\.type=auto needs student\.checkpoint_path: set it"):
        recognised(compose(["student.type=auto"]))
    with pytest.raises(ValueError, match=r"student\.checkpoint_path=.*nowhere"):
        found(tmp_path / "nowhere")

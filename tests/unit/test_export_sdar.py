"""The folder of SDAR's form: each field, each tensor, what transformers makes of it, and who is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from student_trainer import loop
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.export import main as export
from student_trainer.export.expression import CannotExpressError
from student_trainer.export.mask_token import with_mask_token
from student_trainer.export.sdar import MASK, sdar_config, sdar_weights
from student_trainer.settings import StudentSettings
from student_trainer.students.diffusion_record import DiffusionRecord
from tests.models import tiny_tokenizer
from tests.trainer_run import ScriptedTargets, Workshop, run_here

QWEN_ROWS, QWEN_TOKENS, END, END_OF_TURN = 151936, 151669, 151643, 151645


def save_qwen3(folder: Path) -> Path:
    """Qwen3's rows and special tokens in a model of width 16."""
    config = Qwen3Config(
        vocab_size=QWEN_ROWS, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, rope_theta=1000000.0, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=END, eos_token_id=END, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [END_OF_TURN, END], END
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(QWEN_TOKENS)}
    words["<|endoftext|>"], words["<|im_end|>"] = END, END_OF_TURN
    del words[f"w{END}"], words[f"w{END_OF_TURN}"]
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def exported(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of a step, whose head is tied, and its export."""
    root = tmp_path_factory.mktemp("run")
    model = save_qwen3(root / "model")
    arguments = workshop.settings(
        root, f"student.checkpoint_path={model}", "student=diffusion", "student.diffusion.block_size=8", "run.steps=1",
        f"student.diffusion.mask_token_id={MASK}", "teacher=none", "distillation=cross_entropy", "data.rows=2",
        "data.seq_len=16",
    )  # fmt: skip
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert export([str(root / "run"), "--format", "sdar", "--out", str(root / "out"), "--name", "tiny"]) == 0
    return root / "run", root / "out"


def test_each_field_is_sdars(exported: tuple[Path, Path]) -> None:
    _, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("torch_dtype") == "float32" and config.pop("use_cache") is True
    assert config == {
        "model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 8, "mask_token_id": 151669,
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "tie_word_embeddings": False, "rope_theta": 1000000.0, "rope_scaling": None, "vocab_size": 151936,
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.2, "max_position_embeddings": 512, "max_window_layers": 28,
        "sliding_window": None, "use_sliding_window": False, "bos_token_id": END, "eos_token_id": END,
        "pad_token_id": END,
    }  # fmt: skip
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [END_OF_TURN, END] and generation["pad_token_id"] == END
    assert (folder / "sglang_low_confidence.yaml").read_text() == "threshold: 0.95\nblock_size: 8\n"
    assert "--dllm-algorithm LowConfidence" in (folder / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.mask_token == "<|MASK|>" and tokenizer.mask_token_id == 151669 == len(tokenizer) - 1
    named = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert [each["content"] for each in named if each["id"] == 151669] == ["<|MASK|>"]
    assert "<MASK>" not in tokenizer.get_vocab()


def test_each_tensor_is_the_students_under_qwen3s_name(exported: tuple[Path, Path]) -> None:
    run, folder = exported
    student = load_student(StudentSettings(architecture="diffusion", checkpoint_path=str(run)), torch.device("cpu"))
    written = load_file(folder / "model.safetensors")
    layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
             "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
             "post_attention_layernorm")  # fmt: skip
    expected = {f"model.layers.{index}.{name}.weight" for index in range(2) for name in layer}
    assert written.keys() == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    theirs = student.model.state_dict()
    for name, tensor in written.items():
        assert torch.equal(tensor, theirs[name]), name
    assert student.reader.record == DiffusionRecord(8, MASK, "in_place", "block_causal")  # type: ignore[attr-defined]


_SCRIPT = """
import sys
for name in ("student_trainer", "teacher_proto"):
    sys.modules[name] = None
import numpy, torch, transformers
folder, ids, out = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert (config.rope_theta, config.block_size, config.mask_token_id) == (1000000.0, 8, 151669), config
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
ids_BT = torch.from_numpy(numpy.load(ids))
with torch.no_grad():
    numpy.save(out, model(ids_BT, use_cache=False).logits.numpy())
try:
    model(ids_BT, use_cache=True)
except ValueError as error:
    assert "use_cache=False" in str(error)
else:
    raise AssertionError("a cache was taken")
"""


def test_transformers_alone_computes_what_the_student_does(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """By the folder's own two files, in a process without ours: row t of what is masked is the noisy half's."""
    run, folder = exported
    ids_BT = np.random.default_rng(0).integers(0, 60, (2, 16))
    ids_BT[:, 9:12] = MASK
    np.save(tmp_path / "ids.npy", ids_BT)
    command = [sys.executable, "-c", _SCRIPT, str(folder), str(tmp_path / "ids.npy"), str(tmp_path / "out.npy")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, timeout=120)
    settings = StudentSettings(
        architecture="diffusion", checkpoint_path=str(run), attention="sdpa", compute="float32"
    )  # fmt: skip
    model = load_student(settings, torch.device("cpu")).model.eval()
    block_T = torch.arange(16) // 8
    mask_BTT = (block_T[:, None] >= block_T[None, :])[None, None].expand(2, 1, -1, -1)
    with torch.no_grad():
        ours_BTV = model(torch.from_numpy(ids_BT), attention_mask=mask_BTT, use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), ours_BTV, rtol=1e-4, atol=1e-4)


def test_what_is_written_can_be_trained_on(exported: tuple[Path, Path], workshop: Workshop, tmp_path: Path) -> None:
    """Told by `student.type=auto`, as SDAR's own folders are; its mask token is one of its tokenizer now."""
    _, folder = exported
    arguments = workshop.settings(
        tmp_path, f"student.checkpoint_path={folder}", "student.type=auto", "run.steps=1", "teacher=none",
        "data.rows=2", "data.seq_len=16", "distillation=cross_entropy",
    )  # fmt: skip
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    assert export([str(tmp_path / "run"), "--format", "hf", "--skip-check", "--out", str(tmp_path / "hf")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").mask_token_id == MASK


def test_a_tokenizer_names_the_mask_token_behind_its_last_or_one_that_it_has() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    named, why = with_mask_token(tokenizer, size)
    assert (named.mask_token, named.mask_token_id, len(named), why) == ("<|MASK|>", size, size + 1, "")
    assert len(tokenizer) == size and tokenizer.mask_token is None
    assert named("<s>a<|MASK|>b")["input_ids"][-2] == size
    again, why = with_mask_token(named, size)
    assert (again.mask_token_id, len(again), why) == (size, size + 1, "")
    for wrong, reason in ((named, f"its <|MASK|> is token {size}"), (tokenizer, "a new one can't get id 500")):
        kept, why = with_mask_token(wrong, 500)
        assert kept is wrong and reason in why


REFUSED = {
    "causal": (("student=causal",), "the student reads from left to right"),
    "llama": ((), "it is a llama model, not Qwen3 with norms of queries and keys.*its mask token is 512"),
    "quantised": (("student.quantiser=bitnet",), "its weights are quantised in each forward pass"),
    "shift": (("student.diffusion.family=token_shift",), "family is token_shift, in SDAR a row predicts its own token"),
    "causal half": (
        ("student.diffusion.clean_half=causal",),
        "clean_half is causal, in SDAR a prompt's token sees its",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_sglang_would_compute_otherwise_is_refused(workshop: Workshop, tmp_path: Path, name: str) -> None:
    more, message = REFUSED[name]
    arguments = workshop.settings(
        tmp_path, "student=diffusion", *(() if name == "causal" else ("student.diffusion.block_size=4",)), *more,
        "teacher=none", "distillation=cross_entropy", "run.steps=1",
    )  # fmt: skip
    assert run_here(arguments, ScriptedTargets()) == loop.DONE
    with pytest.raises(CannotExpressError, match=message):
        export([str(tmp_path / "run"), "--format", "sdar"])
    assert not (tmp_path / "run" / "exports" / "sdar").exists()


def test_a_rotation_or_window_of_another_kind_is_refused(tmp_path: Path) -> None:
    from student_trainer.export.sdar import check_sdar
    from student_trainer.students.diffusion_record import write_diffusion

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=QWEN_ROWS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
        )
    )  # fmt: skip
    record = DiffusionRecord(4, MASK, "in_place", "block_causal")
    write_diffusion(model.config, record)
    assert check_sdar(model, None) == record
    assert sdar_config(model, record)["rope_theta"] == 10000.0
    assert torch.equal(sdar_weights(model)["lm_head.weight"], model.lm_head.weight)
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    model.config.use_sliding_window = True
    with pytest.raises(CannotExpressError, match="use sliding-window attention; its rotary positions are of type yarn"):
        check_sdar(model, None)

"""`stillhouse-train export` from a finished run, as a process: each format, the card, the refusals, the check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from student_trainer.cli import export as export_command
from student_trainer.students.pretrained import load_quantised
from tests.models import save_tiny_llama, tiny_tokenizer
from tests.trainer_run import Workshop, run_here, train
from tests.unit.students.tiny import tiny_model

TEXT_ALONE = ("teacher=none", "distillation=cross_entropy", "prefetch.depth=0", "evaluation.every=6")


def finished(root: Path, workshop: Workshop, *overrides: str) -> Path:
    arguments = workshop.settings(root, *TEXT_ALONE, *overrides)
    assert run_here([each for each in arguments if not each.startswith("teacher.")]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def run(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ternary run; tied embeddings, as llama.cpp's bitnet has them."""
    folder = tmp_path_factory.mktemp("exported")
    student = save_tiny_llama(folder / "tied", num_hidden_layers=1, tie_word_embeddings=True)
    return finished(folder, workshop, "student=bitnet", f"student.checkpoint_path={student}")


@pytest.mark.parametrize(
    ("form", "reader"),
    [
        ("hf", "transformers alone"),
        ("bitnet", "transformers alone"),
        ("gguf", "(llama.cpp|every tensor is as it was written)"),
    ],
)
def test_a_finished_run_becomes_files_that_others_load(run: Path, tmp_path: Path, form: str, reader: str) -> None:
    out = tmp_path / "out"
    code = train(["export", str(run), "--format", form, "--out", str(out), "--name", "tiny-1.58"], tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert code == 0, text
    assert "reloaded" in text and re.search(reader, text)
    card = (out / "README.md").read_text()
    for expected in ("# tiny-1.58", "1.58-bit student made from tied", "held-out cross_entropy, a, step 12", "run:"):
        assert expected in card, card
    assert "a: jsonl a.jsonl, weight 1" in card
    names = {path.name for path in out.iterdir()}
    assert ("tiny-1.58.gguf" in names) if form == "gguf" else {"model.safetensors", "tokenizer.json"} <= names


def test_a_full_precision_student_is_written_as_it_is(workshop: Workshop, tmp_path: Path) -> None:
    run = finished(tmp_path, workshop)
    log = tmp_path / "log"
    assert train(["export", str(run), "--format", "hf"], log) == 0, log.read_text()
    model = AutoModelForCausalLM.from_pretrained(run / "exports" / "hf")
    assert type(model).__name__ == "LlamaForCausalLM" and "transformers alone: KL" in log.read_text()
    assert "1.58" not in (run / "exports" / "hf" / "README.md").read_text()
    assert train(["export", str(run), "--format", "gguf"], log) == 2
    assert "format gguf can't hold this student (student.quantiser is none): use --format hf" in log.read_text()


def test_what_a_format_lacks_is_refused_by_name(workshop: Workshop, tmp_path: Path) -> None:
    source = tmp_path / "qwen3"
    tiny_model("qwen3", vocab_size=512).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    run = finished(tmp_path, workshop, "student=bitnet", f"student.checkpoint_path={source}")
    for form in ("bitnet", "gguf"):
        assert train(["export", str(run), "--format", form], tmp_path / form) == 2
        assert "cannot express this student: QK-norm" in (tmp_path / form).read_text()
    assert "use --format hf" in (tmp_path / "bitnet").read_text()
    assert train(["export", str(run), "--format", "hf"], tmp_path / "hf") == 0
    assert "reloaded with load_quantised" in (tmp_path / "hf").read_text()
    assert AutoConfig.from_pretrained(run / "exports" / "hf").model_type == "qwen3"


def test_the_command_says_what_is_wrong(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert train(["export", str(tmp_path), "--format", "hf"], log) == 2
    assert "is not the folder of a run" in log.read_text()
    (tmp_path / "there").mkdir()
    assert train(["export", str(run), "--format", "hf", "--out", str(tmp_path / "there")], log) == 2
    assert "already exists" in log.read_text()


def test_an_export_that_is_another_model_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were lost on the way: the check reads the files, not what was meant to be in them."""

    def damaged(folder: str) -> Any:
        file = Path(folder) / "model.safetensors"
        scrambled = {name: tensor[torch.randperm(len(tensor))] for name, tensor in load_file(file).items()}
        save_file(scrambled, file, metadata={"format": "pt"})
        return load_quantised(folder)

    monkeypatch.setattr(export_command, "load_quantised", damaged)
    with pytest.raises(export_command.NotTheSameError, match="does not match the trained student"):
        export_command.main([str(run), "--format", "hf", "--architecture", "original", "--out", str(tmp_path / "out")])

"""Held-out figures by document, a run's time limit, and a run that is not evaluated before its first step."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.cli.compose import compose
from student_trainer.data.loader import BatchSource
from student_trainer.main import main
from tests.trainer_run import ScriptedTargets, Workshop, lines_of, run_here, steps_of


def test_documents_add_up_to_the_figures_of_their_source(workshop: Workshop, tmp_path: Path) -> None:
    # Rows with several documents, several micro batches a batch.
    lines = ("evaluation.every=2", "run.steps=2", "data.rows=3", "optim.micro_batch_rows=2", "data.held_out_rows=6")
    assert run_here(workshop.settings(tmp_path, *lines), ScriptedTargets()) == 0
    sums: dict[tuple[int, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    documents: dict[tuple[int, str], list[str]] = defaultdict(list)
    for line in lines_of(tmp_path / "run", "documents.jsonl"):
        documents[line["step"], line["source"]].append(line["document"])
        for name in ("tokens", "cross_entropy", "kl", "agreed"):
            sums[line["step"], line["source"]][name] += line[name]
    evaluations = lines_of(tmp_path / "run", "evaluation.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2]
    for line in evaluations:
        for source in "ab":
            of_source = sums[line["step"], source]
            assert of_source["tokens"] == line[source]["tokens"]
            assert of_source["agreed"] / of_source["tokens"] == line[source]["agreement"]
            for name in ("cross_entropy", "kl"):
                assert of_source[name] / of_source["tokens"] == pytest.approx(line[source][name], rel=1e-6)
            assert len(documents[line["step"], source]) == len(set(documents[line["step"], source])) > 5
    # Pairs: every evaluation has the same documents.
    assert documents[0, "a"] == documents[2, "a"]


def test_a_documents_figures_are_its_own(workshop: Workshop, tmp_path: Path) -> None:
    lines = ("evaluation.every=1", "run.steps=1")
    assert run_here(workshop.settings(tmp_path, *lines), ScriptedTargets()) == 0
    settings = compose(workshop.settings(tmp_path))
    from student_trainer.build_components import load_tokenizer

    source = BatchSource(settings.data, load_tokenizer(settings), 0)
    held_out = {
        d.key: batch.tokens_BT[d.row, d.start : d.stop] for batch in source.held_out("b") for d in batch.documents
    }
    source.close()
    model = AutoModelForCausalLM.from_pretrained(workshop.student, dtype=torch.float32)
    before = [
        line for line in lines_of(tmp_path / "run", "documents.jsonl") if (line["step"], line["source"]) == (0, "b")
    ]
    assert before
    for line in before:
        tokens_1T = torch.from_numpy(held_out[line["document"]]).long()[None]
        with torch.no_grad():
            mean = model(tokens_1T, labels=tokens_1T).loss
        assert line["tokens"] == tokens_1T.shape[1] - 1
        assert line["cross_entropy"] / line["tokens"] == pytest.approx(float(mean), rel=1e-4)


def test_a_run_without_a_teacher_has_neither_kl_nor_agreement(workshop: Workshop, tmp_path: Path) -> None:
    lines = ("teacher=none", "distillation=cross_entropy", "evaluation.every=1", "run.steps=1")
    with pytest.raises(SystemExit) as ended:
        main([line for line in workshop.settings(tmp_path, *lines) if line != "teacher.top_k=16"])
    assert ended.value.code == 0
    for line in lines_of(tmp_path / "run", "documents.jsonl"):
        assert line["kl"] is None and line["agreed"] is None and line["cross_entropy"] > 0


def test_time_that_is_over_ends_a_run_as_its_last_step_does(workshop: Workshop, tmp_path: Path) -> None:
    lines = ("run.time_limit_s=1e-3", "evaluation.every=100", "run.steps=12")
    assert run_here(workshop.settings(tmp_path, *lines), ScriptedTargets()) == 0
    folder = tmp_path / "run"
    assert steps_of(folder) == [1]
    assert [line["step"] for line in lines_of(folder, "evaluation.jsonl")] == [0, 1]
    assert (folder / "passage.json").exists()
    assert (folder / "checkpoints/latest").exists() and (folder / "checkpoints/step-00000001").is_dir()


def test_a_run_that_is_in_time_makes_all_its_steps(workshop: Workshop, tmp_path: Path) -> None:
    lines = ("run.time_limit_s=3600", "evaluation.every=100", "run.steps=3", "evaluation.at_start=false")
    assert run_here(workshop.settings(tmp_path, *lines), ScriptedTargets()) == 0
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    # Without the evaluation before the first step, the last is the only one.
    assert [line["step"] for line in lines_of(tmp_path / "run", "evaluation.jsonl")] == [3]

"""What the student writes after held-out beginnings: the greedy continuation, in a file, the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.cli.compose import compose
from student_trainer.data.loader import BatchSource
from tests.trainer_run import ScriptedTargets, Workshop, lines_of, run_here

LINES = ("evaluation.every=6", "evaluation.samples=3", "evaluation.prompt_tokens=5", "evaluation.sample_tokens=7")


def test_samples_are_greedy_continuations_of_held_out_documents(workshop: Workshop, tmp_path: Path) -> None:
    assert run_here(workshop.settings(tmp_path, *LINES), ScriptedTargets()) == 0
    samples = lines_of(tmp_path / "run", "samples.jsonl")
    assert [(line["step"], line["source"]) for line in samples] == [
        (step, name) for step in (0, 6, 12) for name in "ab" for _ in range(3)
    ]
    tokenizer: Any = AutoTokenizer.from_pretrained(workshop.student)
    model: Any = AutoModelForCausalLM.from_pretrained(workshop.student)
    source = BatchSource(compose(workshop.settings(tmp_path)).data, tokenizer, 0)
    documents = {d.key: (batch, d) for name in "ab" for batch in source.held_out(name) for d in batch.documents}
    source.close()
    for line in samples[:6]:
        batch, d = documents[line["document"]]
        ids = batch.tokens_BT[d.row, d.start : d.stop].tolist()
        assert line["prompt"] == tokenizer.decode(ids[:5])
        assert line["instead"] == tokenizer.decode(ids[5:12])
        written = ids[:5]
        with torch.no_grad():
            while len(written) < 12 and (len(written) == 5 or written[-1] != tokenizer.eos_token_id):
                written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
        assert line["written"] == tokenizer.decode(written[5:])
        assert line["ended"] == (written[-1] == tokenizer.eos_token_id)


def test_a_run_may_have_none(workshop: Workshop, tmp_path: Path) -> None:
    lines = ("evaluation.every=6", "evaluation.samples=0", "run.steps=2")
    assert run_here(workshop.settings(tmp_path, *lines), ScriptedTargets()) == 0
    assert lines_of(tmp_path / "run", "samples.jsonl") == []


def test_trackers_get_the_texts(workshop: Workshop, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_here(workshop.settings(tmp_path, *LINES, "logging.tensorboard=true"), ScriptedTargets()) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    last = [
        line for line in lines_of(tmp_path / "run", "samples.jsonl") if line["step"] == 12 and line["source"] == "a"
    ]
    texts = events.Tensors("samples/a/text_summary")
    assert [text.step for text in texts] == [0, 6, 12]
    [shown] = texts[-1].tensor_proto.string_val
    for line in last:
        assert line["written"] in shown.decode()

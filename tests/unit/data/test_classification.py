"""Examples with a class: the prompt and the one token that is learnt, the accuracy of a run, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.compose import compose
from student_trainer.data.classification import LabelWords, one_set_of_words
from student_trainer.data.loader import BatchSource
from student_trainer.main import main
from student_trainer.reporting.report import main as report
from student_trainer.settings import StudentSettings
from student_trainer.settings.data import DataSettings, SourceSettings
from student_trainer.targets.protocol import Queries
from tests.models import save_tiny_llama, tiny_tokenizer
from tests.trainer_run import ScriptedTargets, lines_of, run_here, trace_of

TEMPLATE = "Label {text}:"
LABELS = {"bad": "N", "good": "P"}


def write_examples(path: Path, count: int = 400) -> Path:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            label = draw.choice(list(LABELS))
            text = "".join(draw.choices("abcdefgh", k=6)) + {"bad": "Z", "good": "X"}[label]
            file.write(json.dumps({"text": text, "label": label, "id": 3}) + "\n")
    return path


def source(**changes: Any) -> SourceSettings:
    settings = {"kind": "jsonl", "path": "x.jsonl", "format": "classification", "template": TEMPLATE, "labels": LABELS}
    return SourceSettings(**(settings | changes))


def test_the_word_of_the_class_alone_is_learnt(tmp_path: Path) -> None:
    path = write_examples(tmp_path / "examples.jsonl", 20)
    data = DataSettings(
        sources={"e": source(path=str(path), held_out_fraction=0)}, seq_len=32, rows=4, packing="none", add_eos=False,
        cache_folder=str(tmp_path / "cache"), add_bos=True,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    batches = BatchSource(data, tokenizer, seed=0)
    try:
        batch, _ = batches.batch(batches.initial_state(), 0)
    finally:
        batches.close()
    for document in batch.documents:
        tokens = batch.tokens_BT[document.row, document.start : document.stop]
        said = tokenizer.decode(tokens)
        assert said.startswith("<s>") and said[3:9] == "Label " and said[-1] in "NP"
        assert said[-3:-1] == ("Z:" if said[-1] == "N" else "X:")
        counted = batch.loss_mask_BT[document.row, document.start : document.stop]
        assert counted.sum() == 1 and counted[-2]


def arguments(tmp_path: Path, *more: str) -> list[str]:
    student = save_tiny_llama(tmp_path / "student", num_hidden_layers=1)
    path = write_examples(tmp_path / "examples.jsonl")
    return [
        "data=classification", f"data.sources.examples.path={path}", "data.seq_len=24", "data.rows=16",
        "data.held_out_rows=64",
        'data.sources.examples.template="{text}"', "data.sources.examples.labels={bad: N, good: P}",
        "data.sources.examples.held_out_fraction=0.2", f"data.cache_folder={tmp_path / 'cache'}", "data.workers=1",
        f"student.checkpoint_path={student}", "student.compute=float32", f"run.root={tmp_path}", "run.id=run",
        "run.threads=1", "logging.wandb=off", "logging.progress=off", "optim.learning_rate=1e-2", *more,
    ]  # fmt: skip


def test_a_run_learns_the_classes_and_tells_its_accuracy(tmp_path: Path) -> None:
    plain = ("teacher=none", "distillation=cross_entropy", "run.steps=12", "evaluation.every=12")
    assert run_here(arguments(tmp_path, *plain)) == 0
    first, last = (line["examples"] for line in lines_of(tmp_path / "run", "evaluation.jsonl"))
    assert first["accuracy"] < 0.8 and last["accuracy"] > 0.95
    assert last["tokens"] == 64, "an example has one token that counts, a row one example"


def test_a_run_tells_which_class_it_takes_for_which(tmp_path: Path) -> None:
    """Counts add up to the accuracy; the examples are the same in each evaluation; the page shows them."""
    more = (
        "distillation=logits_only",
        "run.steps=2",
        "evaluation.every=2",
        "teacher.sanity=off",
        "data.packing=best_fit",
    )
    # Many logprobs: the teacher's have a class among them mostly, not always.
    assert run_here(arguments(tmp_path, *more, "evaluation.top_k=256"), ScriptedTargets()) == 0
    first, last = lines_of(tmp_path / "run", "classes.jsonl")
    evaluations = lines_of(tmp_path / "run", "evaluation.jsonl")
    for line, evaluation in zip((first, last), evaluations, strict=True):
        counts, figures = line["student"], evaluation["examples"]
        assert line["words"] == ["N", "P"] and sum(map(sum, counts)) == figures["tokens"] > 60
        assert (counts[0][0] + counts[1][1]) / figures["tokens"] == pytest.approx(figures["accuracy"])
        assert all(sum(heard) <= sum(all_) for heard, all_ in zip(line["teacher"], counts, strict=True))
        assert len(line["examples"]) == 20
    assert [e["document"] for e in first["examples"]] == [e["document"] for e in last["examples"]]
    assert any(example["teacher"] is None for example in last["examples"])
    shown = next(example for example in last["examples"] if example["teacher"] is not None)
    assert "X" in shown["prompt"] or "Z" in shown["prompt"]
    assert ("X" in shown["prompt"]) == (last["words"][shown["right"]] == "P")
    assert 0.5 <= shown["student_probability"] <= 1 and 0.5 <= shown["teacher_probability"] <= 1

    assert report([str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "accuracy, held out, examples" in page and "20 examples, and what each model predicts" in page
    assert page.count("<caption>") == 2 and "<caption>teacher: " in page and "<caption>run: " in page
    assert page.count(shown["prompt"]) == 1 and "predicted P" in page


def test_classes_without_a_teacher_and_among_ids_that_lack_them(tmp_path: Path) -> None:
    plain = ("recipe=classification_teacher", "run.steps=1", "evaluation.every=1", "evaluation.at_start=false")
    assert run_here(arguments(tmp_path, *plain)) == 0
    (line,) = lines_of(tmp_path / "run", "classes.jsonl")
    assert line["teacher"] is None and all(example["teacher"] is None for example in line["examples"])


@pytest.mark.parametrize(
    ("recipe", "bits"), [("classification_teacher", "none"), ("bitnet_sft", "bitnet"), ("bitdistill", "bitnet")]
)
def test_recipes_train_on_classes_and_go_on_where_they_were_stopped(recipe: str, bits: str, tmp_path: Path) -> None:
    """Two steps are the same in one go and in two."""
    asks = recipe == "bitdistill"
    teacher = ["teacher.sanity=off", "teacher.top_k=16", "distillation.attention.coefficient=null"]
    more = [f"recipe={recipe}", "evaluation.every=0", "checkpoint.every=1", *(teacher if asks else [])]
    settings = compose(arguments(tmp_path, *more))
    assert settings.student.quantiser == bits and (settings.distillation.gather_at == "labels") == asks
    traces = []
    for name, steps in (("whole", (2,)), ("parts", (1, 2))):
        for count in steps:
            allowed = "run.allow_changes=[run.steps]" if count == 2 and len(steps) == 2 else "run.resume=auto"
            line = arguments(
                tmp_path, *more, f"run.id={name}", f"run.steps={count}", allowed, "optim.schedule.kind=constant"
            )
            assert run_here(line, ScriptedTargets() if asks else None) == 0
        traces.append(trace_of(tmp_path / name))
    assert traces[0] == traces[1] and len(traces[0]) == 2
    if asks:
        assert traces[0][0]["loss/label_kl"] > 0


def test_bitdistill_compares_at_the_words_where_nothing_else_is_said() -> None:
    base = ["recipe=bitdistill", "student.checkpoint_path=x", "data=movie_reviews"]
    terms = compose(base).distillation.by_name()
    assert list(terms) == ["cross_entropy", "label_kl", "attention"]
    assert list(compose([*base, "distillation=logits_only"]).distillation.by_name()) == ["cross_entropy", "top_k_kl"]
    text = ["recipe=bitdistill", "student.checkpoint_path=x", "data=short_texts"]
    assert "top_k_kl" in compose(text).distillation.by_name()


def test_an_example_of_no_known_class_stops_the_run_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = arguments(tmp_path, "recipe=bitnet_sft", "run.steps=1")
    with (tmp_path / "examples.jsonl").open("a") as file:
        file.write(json.dumps({"text": "abcdefX", "label": "ugly"}) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    assert "'label' is 'ugly', expected one of 'bad', 'good'" in " ".join(capfd.readouterr().err.split())


class Listening(ScriptedTargets):
    """Keeps the ids at which the teacher was asked, and what it answered."""

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        answer = await super().fetch(batch, queries)
        asked = [query.gather_ids_RG for query in queries if query is not None and query.gather_width]
        if asked:
            self.heard = (asked, answer)
        return answer


def test_the_teacher_is_heard_on_the_words_of_the_classes(tmp_path: Path) -> None:
    """The loss is the divergence of the two distributions over the classes, softened."""
    loss = ("distillation=classification", "distillation.attention.coefficient=null", "teacher.top_k=16")
    more = (*loss, "run.steps=1", "evaluation.every=1", "teacher.sanity=off", "optim.learning_rate=1e-9")
    targets = Listening()
    assert run_here(arguments(tmp_path, *more), targets) == 0
    words = list(LabelWords(tiny_tokenizer(), source()).ids.values())
    asked, answer = targets.heard
    assert len(asked) == 16 and all(ids_RG.tolist() == [words] for ids_RG in asked)
    line = lines_of(tmp_path / "run")[0]
    assert line["tokens"] == 16 and line["weighted/label_kl"] == pytest.approx(10 * line["loss/label_kl"])
    settings = StudentSettings(checkpoint_path=str(tmp_path / "student"), compute="float32")
    student = load_student(settings, torch.device("cpu"))
    values = []
    for tokens_T, targets_of_one in zip(tokens_of(tmp_path), answer.documents, strict=True):
        with torch.no_grad():
            logits_V = student.model(torch.tensor(tokens_T)[None]).logits[0, -2].double()
        theirs_C = (torch.from_numpy(targets_of_one.gather_logprobs[0]).double() / 5).log_softmax(0)
        ours_C = (logits_V[words] / 5).log_softmax(0)
        values.append(float((theirs_C.exp() * (theirs_C - ours_C)).sum()))
    assert line["loss/label_kl"] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert "accuracy" in lines_of(tmp_path / "run", "evaluation.jsonl")[0]["examples"]


def tokens_of(tmp_path: Path) -> list[list[int]]:
    """The examples of the run's first batch."""
    settings = compose([*arguments(tmp_path), "teacher=none", "distillation=cross_entropy"])
    batches = BatchSource(settings.data, tiny_tokenizer(), settings.run.seed)
    try:
        batch, _ = batches.batch(batches.initial_state(), 0)
    finally:
        batches.close()
    return [batch.tokens_BT[d.row, d.start : d.stop].tolist() for d in batch.documents]


def test_sources_of_other_words_cannot_share_them(tmp_path: Path) -> None:
    other = source(labels={"bad": "A", "good": "B"})
    with pytest.raises(ValueError, match="needs sources of format classification with the same words"):
        one_set_of_words(DataSettings(sources={"a": source(), "b": other}), tiny_tokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"1": " yes"}}, "a word for each of two or more"),
        ({"template": "no field"}, r"needs a `template` with \{FIELD\}s"),
        ({"template": "{a.b}"}, "is not a field name"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**changes)


def test_words_and_classes_are_checked() -> None:
    with pytest.raises(ValueError, match="expected one; choose another word"):
        LabelWords(tiny_tokenizer(), source(labels={"0": "never seen", "1": "P"}))
    with pytest.raises(ValueError, match="two classes have the same token"):
        LabelWords(tiny_tokenizer(), source(labels={"0": "P", "1": "P"}))
    words = LabelWords(tiny_tokenizer(), source())
    with pytest.raises(ValueError, match="'label' is 'ugly', expected one of 'bad', 'good'"):
        words({"text": "x", "label": "ugly"})


@pytest.mark.parametrize(("name", "classes"), [("mnli", 3), ("qnli", 2), ("sst2", 2)])
def test_the_glue_sets_are_settings(name: str, classes: int) -> None:
    settings = compose([f"data={name}", "teacher=none", "distillation=cross_entropy"]).data
    assert settings.packing == "none" and len(settings.sources[name].labels) == classes
    assert settings.sources[name].name == "nyu-mll/glue" and "label" in settings.sources[name].columns

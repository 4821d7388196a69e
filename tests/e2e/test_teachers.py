"""One run, any source of targets: online, out of a store, written through, in this process, several at once.

The trainer is a process, the teacher a real service, and what must be the same is the same to the last bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from student_trainer import main
from tests.models import VOCAB_SIZE, save_tiny_llama
from tests.teacher_process import TeacherProcess
from tests.trainer_run import (
    SIGKILL,
    TrainerProcess,
    Workshop,
    final_files,
    lines_of,
    steps_of,
    teacher_script,
    trace_of,
    train,
    wait_for_step,
)

STEPS = 16


def arguments(workshop: Workshop, root: Path, *overrides: str) -> list[str]:
    """Two epochs and a bit of the documents, and evaluation."""
    return workshop.settings(
        root, f"run.steps={STEPS}", "data.rows=8", "evaluation.every=8", "distillation.terms.top_k_kl.temperature=2",
        *overrides,
    )  # fmt: skip


def run(workshop: Workshop, root: Path, *overrides: str) -> str:
    """Train to the end; what was printed."""
    root.mkdir(exist_ok=True)
    code = train(arguments(workshop, root, *overrides), root / "output.txt")
    said = (root / "output.txt").read_text()
    assert code == 0, said
    return said


def assert_same(one: Path, other: Path) -> None:
    assert trace_of(one / "run") == trace_of(other / "run")
    assert final_files(one / "run", STEPS) == final_files(other / "run", STEPS)
    assert lines_of(one / "run", "evaluation.jsonl") == lines_of(other / "run", "evaluation.jsonl")


@pytest.fixture(scope="module")
def online(workshop: Workshop, teacher: TeacherProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("online")
    run(workshop, root, f"teacher.url={teacher.url}")
    return root


def cached(store: Path, *overrides: str) -> tuple[str, ...]:
    return ("teacher=cached", f"teacher.store={store}", *overrides)


def test_a_store_that_is_written_through_and_then_replayed_gives_the_online_run(
    workshop: Workshop, teacher: TeacherProcess, online: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    said = run(workshop, tmp_path / "first", *cached(store, "teacher.on_miss=remote", f"teacher.url={teacher.url}"))
    assert_same(tmp_path / "first", online)
    assert " were missing" in said
    # Nobody answers at this port: all is in the store.
    run(workshop, tmp_path / "second", *cached(store, "teacher.on_miss=remote", "teacher.url=http://127.0.0.1:9"))
    assert_same(tmp_path / "second", online)
    run(workshop, tmp_path / "third", *cached(store))
    assert_same(tmp_path / "third", online)


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_what_a_service_of_a_real_model_kept_replays_its_run(workshop: Workshop, tmp_path: Path, engine: str) -> None:
    store = tmp_path / "store"
    with TeacherProcess(str(workshop.student), "--engine", engine, "--dtype", "float32", "--store", str(store)) as real:
        run(workshop, tmp_path / "online", f"teacher.url={real.url}", "teacher.sanity=off")
        real.signal()
        assert real.wait() == 0
    run(workshop, tmp_path / "replay", *cached(store), "teacher.sanity=off")
    assert_same(tmp_path / "replay", tmp_path / "online")


def test_a_run_goes_on_with_the_answers_in_a_store_where_its_teacher_has_gone(
    workshop: Workshop, online: Path, tmp_path: Path
) -> None:
    store, root = tmp_path / "store", tmp_path
    with TeacherProcess("--store", str(store), script=teacher_script()) as service:
        run(workshop, tmp_path / "before", f"teacher.url={service.url}")
        given = arguments(workshop, root, f"teacher.url={service.url}")
        with TrainerProcess(given, root / "output.txt") as trainer:
            wait_for_step(root / "run", 9, trainer)
            trainer.signal(SIGKILL)
            trainer.wait()
        service.signal()
        assert service.wait() == 0
    run(workshop, root, *cached(store))
    assert "resumed at step" in (root / "output.txt").read_text()
    assert_same(root, online)


@pytest.mark.slow
def test_sequences_are_written_filled_and_trained_on(workshop: Workshop, tmp_path: Path) -> None:
    """`sequences`, `stillhouse-teacher fill` and `teacher=cached`, as the message about a miss says."""
    store, file = tmp_path / "store", tmp_path / "sequences.jsonl"
    assert main.run(["sequences", str(file), *arguments(workshop, tmp_path / "first")]) == 0
    fill = [sys.executable, "-m", "teacher_service.main", "fill", str(workshop.student), str(file), "--engine", "hf",
            "--store", str(store), "--top-k", "16"]  # fmt: skip
    subprocess.run(fill, check=True, capture_output=True, timeout=120)
    refused = arguments(workshop, tmp_path / "first", *cached(store), "teacher.sanity=off")
    assert train(refused, tmp_path / "refused.txt") == 2
    said = (tmp_path / "refused.txt").read_text()
    assert "lacks" in said and "fill MODEL" in said and "--temperatures 2" in said and "Traceback" not in said
    assert steps_of(tmp_path / "first" / "run") == []
    subprocess.run([*fill, "--temperatures", "2"], check=True, capture_output=True, timeout=120)
    run(workshop, tmp_path / "second", *cached(store), "teacher.sanity=off")
    assert steps_of(tmp_path / "second" / "run") == list(range(1, STEPS + 1))


def test_a_model_in_the_trainers_process_answers_as_the_service_does(workshop: Workshop, tmp_path: Path) -> None:
    local = ("teacher=local", f"teacher.model={workshop.student}", "teacher.sanity=off")
    with TeacherProcess(str(workshop.student), "--engine", "hf", "--dtype", "float32") as service:
        run(workshop, tmp_path / "served", f"teacher.url={service.url}", "teacher.sanity=off")
    run(workshop, tmp_path / "one", *local)
    served, one = trace_of(tmp_path / "served" / "run"), trace_of(tmp_path / "one" / "run")
    for theirs, ours in zip(served, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    # It repeats itself to the last bit, killed in the middle and whatever the prefetch depth.
    given = arguments(workshop, tmp_path, *local, "prefetch.depth=0")
    with TrainerProcess(given, tmp_path / "output.txt") as trainer:
        wait_for_step(tmp_path / "run", 6, trainer)
        trainer.signal(SIGKILL)
        trainer.wait()
    run(workshop, tmp_path, *local)
    assert_same(tmp_path, tmp_path / "one")


def test_a_teacher_for_each_source_and_an_ensemble(
    workshop: Workshop, teacher: TeacherProcess, online: Path, tmp_path: Path
) -> None:
    both = ("teacher=mixed", f"teacher.members.one.url={teacher.url}", f"teacher.members.two.url={teacher.url}")
    run(workshop, tmp_path / "by", *both, "teacher.mix=by_source", "teacher.members.one.sources=a",
        "teacher.members.two.sources=b")  # fmt: skip
    assert_same(tmp_path / "by", online)
    # The same teacher twice is itself, but for what fp16 rounds away.
    run(workshop, tmp_path / "ensemble", *both, "teacher.members.one.weight=3")
    single, twice = trace_of(online / "run"), trace_of(tmp_path / "ensemble" / "run")
    for theirs, ours in zip(single, twice, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
    refused = arguments(workshop, tmp_path / "ensemble", *both, "teacher.members.one.weight=2")
    assert train(refused, tmp_path / "refused.txt") == 2
    assert "members, weights and sources" in (tmp_path / "refused.txt").read_text()


def test_teachers_may_differ_in_k_and_kinds(workshop: Workshop, online: Path, tmp_path: Path) -> None:
    """One service with a K of its own and a store that knows the top K alone: what both have is to be had."""
    store = tmp_path / "store"
    with TeacherProcess(script=teacher_script(max_top_k=16)) as few, TeacherProcess(script=teacher_script()) as many:
        through = cached(store, "teacher.on_miss=remote", f"teacher.url={many.url}")
        run(workshop, tmp_path / "first", *through, "teacher.top_k=16")
        mixed = (
            "teacher=mixed", "teacher.mix=by_source", f"teacher.members.few.url={few.url}",
            "teacher.members.few.sources=a", "teacher.members.kept.kind=cached",
            f"teacher.members.kept.store={store}", "teacher.members.kept.sources=b",
        )  # fmt: skip
        run(workshop, tmp_path / "by", *mixed)
        assert_same(tmp_path / "by", online)
        for more, said in (
            (["teacher.top_k=17"], "teacher.top_k is 17, but the teacher gives at most 16"),
            (["distillation.terms.drawn.kind=sampled"], "--num-samples 50"),  # by the command that would add them
        ):
            assert train(arguments(workshop, tmp_path / "refused", *mixed, *more), tmp_path / "refused.txt") == 2
            assert said in (tmp_path / "refused.txt").read_text()


def test_each_text_that_the_student_writes_is_scored_by_the_teacher_of_its_source(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    """What others call multi-teacher on-policy distillation."""
    own = ("on_policy=reverse_kl", "on_policy.share=1", "on_policy.prompt_tokens=4", "on_policy.new_tokens=8",
           "run.steps=2", "evaluation.every=0", "teacher.mix=by_source", "teacher.members.one.sources=a",
           "teacher.members.two.sources=b", "teacher.sanity=off", "on_policy.lag=0")  # fmt: skip
    one = f"teacher.members.one.url={teacher.url}"
    with TeacherProcess(script=teacher_script(noise=3.0, identity={"semantic.model": "noisy"})) as noisy:
        for name, second in (("same", teacher.url), ("another", noisy.url)):
            run(workshop, tmp_path / name, "teacher=mixed", one, f"teacher.members.two.url={second}", *own)
    same, another = trace_of(tmp_path / "same" / "run")[0], trace_of(tmp_path / "another" / "run")[0]
    of = {name: f"source/{name}/on_policy_reverse_kl" for name in "ab"}
    assert same["on_policy"] == another["on_policy"] == 1
    assert another[of["a"]] == same[of["a"]], "the first step's text is the same, and its teacher too"
    assert abs(another[of["b"]] - same[of["b"]]) > 0.1


def with_tokens(folder: Path, change: Callable[[dict[str, int]], object]) -> Path:
    """The tiny student with another vocabulary in its tokenizer's file."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    change(tokenizer["model"]["vocab"])
    file.write_text(json.dumps(tokenizer))
    return folder


def test_another_vocabulary_is_shared_where_it_can_be_and_refused_where_not(workshop: Workshop, tmp_path: Path) -> None:
    local = ("teacher=local", f"teacher.model={workshop.student}", "teacher.sanity=off", "run.steps=2")

    def start(name: str, student: Path) -> tuple[int, str]:
        given = [*arguments(workshop, tmp_path / name, *local), f"student.checkpoint_path={student}"]
        code = train(given, tmp_path / f"{name}.txt")
        return code, (tmp_path / f"{name}.txt").read_text()

    padded = save_tiny_llama(tmp_path / "padded-student", vocab_size=VOCAB_SIZE + 64)
    code, said = start("padded", padded)
    assert code == 0 and f"the losses compare the two on the first {VOCAB_SIZE} ids" in said, said

    grown = save_tiny_llama(tmp_path / "grown-student", vocab_size=VOCAB_SIZE + 8)
    code, said = start("grown", with_tokens(grown, lambda vocab: vocab.update(mash=len(vocab))))
    assert code == 0 and "the student has 1 tokens that the teacher lacks, from 'mash'" in said, said

    other = save_tiny_llama(tmp_path / "other-student")
    code, said = start("other", with_tokens(other, lambda vocab: vocab.update(a=vocab["b"], b=vocab["a"])))
    assert code == 2 and "2 ids mean different tokens" in said and "'b' (student), 'a' (teacher)" in said, said
    assert steps_of(tmp_path / "other" / "run") == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher=local"], "teacher.model must be given"),
        (["teacher=local", "teacher.model=/no/such/model"], "/no/such/model"),
        (["teacher=cached"], "teacher.store must be given"),
        (["teacher=cached", "teacher.store=/no/such/store"], "no target store at /no/such/store"),
        (["teacher=mixed"], "name the teachers"),
        (["teacher.members.x.kind=local"], "set teacher=mixed"),
        (["teacher=mixed", "teacher.members.x.kind=local", "teacher.mix=by_source"], "`sources`"),
        (["teacher=mixed", "teacher.members.x.kind=local", "teacher.members.x.model=STUDENT", "teacher.mix=by_source",
          "teacher.members.x.sources=a"], "b is in only one of the two"),
        (["teacher=mixed", "teacher.members.x.kind=local", "teacher.members.x.model=STUDENT",
          "distillation.terms.f.kind=forward_kl", "distillation.terms.f.support=full"], "hidden"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    overrides: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    given = [override.replace("STUDENT", str(workshop.student)) for override in overrides]
    assert main.run(arguments(workshop, tmp_path, *given)) == 2
    text = capfd.readouterr().err
    assert said in text and "Traceback" not in text, text

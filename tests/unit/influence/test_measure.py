"""Influence on small models: against exact gradients and real steps, by the command, stopped and gone on with."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from student_trainer import main
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Placed, build_batch
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import ViewSeed
from student_trainer.cli import influence
from student_trainer.cli.compose import compose
from student_trainer.influence import measure
from student_trainer.influence.embeddings import STEP, FirstBlocks, embed, moved
from student_trainer.influence.gradients import (
    Sketch,
    chosen_parameters,
    differentiating,
    document_gradient,
    noise,
)
from student_trainer.influence.measure import Options
from student_trainer.influence.part_files import PartFiles
from student_trainer.influence.scores import alignments, rank_correlation
from student_trainer.losses.kinds import token_term
from student_trainer.settings import StudentSettings
from student_trainer.students.load import student_from_model
from student_trainer.students.student import Student
from tests.models import save_tiny_llama, tiny_tokenizer
from tests.trainer_run import ScriptedTargets, TrainerProcess, lines_of, run_here

TERMS = (token_term("cross_entropy", "cross_entropy"),)


def tiny_student(tmp_path: Path, **changes: Any) -> Student:
    settings = StudentSettings(checkpoint_path=str(save_tiny_llama(tmp_path / "student")), compute="float32", **changes)
    return student_from_model(settings, torch.device("cpu"))


def views(student: Student, texts: list[str]) -> list[tuple[MicroBatch, ...]]:
    made = []
    for number, text in enumerate(texts):
        ids = tiny_tokenizer()(text, return_tensors="np")["input_ids"][0].astype("int32")
        batch = build_batch(number, [[Placed(0, str(number), ids, None)]], len(ids), 0, ("s",))
        made.append(cut(batch, None, student, ViewSeed(0)))
    return made


def some_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["the", "still", "takes", "a", "wash", "and", "gives", "spirit", "def", "return", "yield", "oak"]
    return [" ".join(draw.choices(words[: 3 + i % 9], k=8)) for i in range(count)]


def exact_gradients(student: Student, documents: list[tuple[MicroBatch, ...]]) -> torch.Tensor:
    parameters = list(chosen_parameters(student.model).values())
    with differentiating(student, parameters):
        rows = [document_gradient(student, each, TERMS, None, parameters) for each in documents]
    return torch.stack([torch.cat([part.flatten() for part in row if part is not None]) for row in rows])


def test_sketched_influence_ranks_as_exact_influence_does(tmp_path: Path) -> None:
    student = tiny_student(tmp_path)
    data, target = views(student, some_texts(60)), views(student, some_texts(12, seed=1))
    exact, of_target = exact_gradients(student, data), exact_gradients(student, target)
    parameters = list(chosen_parameters(student.model).values())
    sketch = Sketch(parameters, Options().sketch, seed=0)
    shapes = [parameter.shape for parameter in parameters]

    def sketched(rows: torch.Tensor) -> torch.Tensor:
        split = [row.split([shape.numel() for shape in shapes]) for row in rows]
        return torch.stack([sketch(list(parts)) for parts in split])

    found = alignments(sketched(exact), sketched(of_target))
    assert rank_correlation(found, alignments(exact, of_target)) >= 0.95
    assert (found / len(target) - alignments(exact, of_target) / len(target)).abs().max() < 5 * noise(sketch.size)


def test_influence_is_what_a_step_does(tmp_path: Path) -> None:
    """A small step along a document's gradient, of length 1, lowers the targets' losses by p where those are weighed
    by the inverse lengths of their gradients.
    """
    student = tiny_student(tmp_path)
    data, target = views(student, some_texts(24)), views(student, some_texts(6, seed=1))
    exact, of_target = exact_gradients(student, data), exact_gradients(student, target)
    parameters = list(chosen_parameters(student.model).values())
    lengths = of_target.norm(dim=1)

    def loss() -> float:
        with torch.no_grad():
            sums = [sum(student.loss(view, TERMS, None).total for view in each) for each in target]
            return sum(float(value) / float(length) for value, length in zip(sums, lengths, strict=True))

    before, drops = loss(), []
    for gradient in exact:
        parts = (gradient / gradient.norm()).split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data -= 1e-2 * part.view_as(parameter)
        drops.append(before - loss())
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data += 1e-2 * part.view_as(parameter)
    influence = alignments(exact, of_target)
    assert rank_correlation(torch.tensor(drops), influence) > 0.98
    assert torch.tensor(drops).sum() / 1e-2 == pytest.approx(float(influence.sum()), rel=0.1)


def test_a_part_of_the_coordinates_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.influence.gradients.MOST_COORDINATES", 2000)
    gradients = torch.randn(2, 30_000)
    gradients[1] += gradients[0]
    sketch = Sketch([gradients[0]], 8192, seed=1)
    a, b = sketch([gradients[0]]), sketch([gradients[1]])
    assert torch.cosine_similarity(a, b, 0) == pytest.approx(2**-0.5, abs=0.06)
    assert sketch([None]).abs().sum() == 0


def test_embeddings_are_directional_derivatives(tmp_path: Path) -> None:
    student = tiny_student(tmp_path)
    micros = [each[0] for each in views(student, some_texts(5))]
    first = FirstBlocks(student, 2)
    found = embed(first, micros, tangents=2, seed=3)
    assert found.shape == (5, 128)
    names = {id(parameter): name for name, parameter in student.model.named_parameters()}
    chosen = {names[id(parameter)]: parameter.detach() for parameter in first.parameters}
    draw = torch.Generator().manual_seed(3 * 1009)
    tangent = {
        name: torch.randn(value.shape, generator=draw) * value.square().mean().sqrt() for name, value in chosen.items()
    }

    for micro in micros:

        def last(values: dict[str, torch.Tensor], micro: MicroBatch = micro) -> torch.Tensor:
            ids = micro.view.input_ids_BT
            states = torch.func.functional_call(
                student.model, values, (ids,), {"output_hidden_states": True, "use_cache": False}
            ).hidden_states
            # The last of these is behind the final norm; the model of two blocks is asked about its second.
            return states[1][0, micro.view.rows_N[-1]]

        one = embed(FirstBlocks(student, 1), [micro], tangents=1, seed=3)[0]
        inner = {name: value for name, value in tangent.items() if ".layers.1." not in name}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, slope = torch.func.jvp(last, ({n: chosen[n] for n in inner},), (inner,))
        assert torch.cosine_similarity(one, slope, 0) > 0.999
    assert found[0, :64].norm() == pytest.approx(1)


def test_the_student_is_as_it_was_afterwards(tmp_path: Path) -> None:
    student = tiny_student(tmp_path)
    before = {name: parameter.clone() for name, parameter in student.model.named_parameters()}
    first = FirstBlocks(student, 4)
    with moved(first.parameters, 5, STEP):
        assert not torch.equal(before["model.embed_tokens.weight"], student.model.get_input_embeddings().weight)
    exact_gradients(student, views(student, some_texts(2)))
    for name, parameter in student.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None


def planted(folder: Path) -> dict[str, Path]:
    """A target of one pattern, and data that follow it, contradict it, or have nothing to do with it."""
    draw = random.Random(0)
    kinds = {"useful": "abcdefgh", "harmful": "abhgfedc", "useless": "QRSTUVWX"}

    def text(pattern: str) -> str:
        start = draw.randrange(8)
        return "".join(pattern[(start + i) % 8] for i in range(24)) + str(draw.randrange(10**6))

    (folder / "target.jsonl").write_text("".join(json.dumps({"text": text(kinds["useful"])}) + "\n" for _ in range(24)))
    rows = [{"text": f"{text(pattern)}", "kind": kind} for kind, pattern in kinds.items() for _ in range(40)]
    draw.shuffle(rows)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "kinds.json").write_text(json.dumps({row["text"]: row["kind"] for row in rows}))
    return {name: folder / f"{name}.jsonl" for name in ("data", "target")}


def command(tmp_path: Path, out: Path, *more: str) -> list[str]:
    files = planted(tmp_path)
    student = tmp_path / "student"
    if not student.exists():
        save_tiny_llama(student)
    return [
        "influence", str(files["data"]), "--target", str(files["target"]), "--out", str(out), "teacher=none",
        "distillation=cross_entropy", f"student.checkpoint_path={student}", "student.compute=float32",
        "data.seq_len=48", "data.workers=1", f"data.cache_folder={tmp_path / 'cache'}", "logging.progress=off", *more,
    ]  # fmt: skip


def by_kind(tmp_path: Path, out: Path, column: str) -> dict[str, float]:
    kinds = json.loads((tmp_path / "kinds.json").read_text())
    rows = pyarrow.parquet.read_table(out).to_pylist()
    return {
        kind: sum(row[column] for row in rows if kinds[row["text"]] == kind) / 40
        for kind in ("useful", "harmful", "useless")
    }


@pytest.mark.parametrize("landmarks", [2048, 40])
def test_the_command_tells_useful_from_harmful_and_useless(
    tmp_path: Path, landmarks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weighted.parquet"
    assert main.run(command(tmp_path, out, "--landmarks", str(landmarks))) == 0
    scores, weights = by_kind(tmp_path, out, "influence"), by_kind(tmp_path, out, "weight")
    assert scores["useful"] > scores["useless"] and scores["useful"] > scores["harmful"]
    assert weights["useful"] > 1.3 and max(weights["useless"], weights["harmful"]) < 1
    assert sum(weights.values()) == pytest.approx(3)
    said = capsys.readouterr().out
    assert "120 documents weighted for 24 target documents" in said
    assert ("rank correlation" in said) == (landmarks == 40)
    assert not out.with_name(out.name + ".work").exists()


def test_a_run_reads_the_documents_by_their_weights(tmp_path: Path) -> None:
    out = tmp_path / "weighted.parquet"
    assert main.run(command(tmp_path, out)) == 0
    source = "data.sources.weighted"
    assert run_here([
        f"{source}.kind=parquet", f"{source}.path={out}", f"{source}.weight_column=weight",
        f"{source}.held_out_fraction=0", "teacher=none", "distillation=cross_entropy", "run.steps=12", "run.id=run",
        f"run.root={tmp_path}", "data.seq_len=48", "data.rows=4", "data.packing=none", "evaluation.every=0",
        f"student.checkpoint_path={tmp_path / 'student'}", "student.compute=float32", "logging.wandb=off",
        "logging.progress=off", f"data.cache_folder={tmp_path / 'cache'}", "data.workers=1",
    ]) == 0  # fmt: skip
    assert len(lines_of(tmp_path / "run")) == 12


def test_it_is_measured_on_the_loss_that_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is asked about targets and landmarks, and its answers change what comes out."""
    outs = [tmp_path / "plain.parquet", tmp_path / "taught.parquet"]
    assert main.run(command(tmp_path, outs[0])) == 0
    targets = ScriptedTargets()

    def open_here(settings: Any, thread: Any, stack: Any, saved: Any = None) -> Any:
        from student_trainer.targets.open import Teacher

        return Teacher(thread.call(targets.open()), targets)

    monkeypatch.setattr("student_trainer.build_components.open_teacher", open_here)
    changes = {"teacher=none": "teacher.url=http://none", "distillation=cross_entropy": "distillation=logits_only"}
    arguments = [changes.get(text, text) for text in command(tmp_path, outs[1], "teacher.top_k=16")]
    assert main.run(arguments) == 0
    assert len(targets.fetched) == 120 + 24
    tables = [pyarrow.parquet.read_table(out) for out in outs]
    assert tables[0].column("text") == tables[1].column("text")
    assert tables[0].column("influence") != tables[1].column("influence")


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.parquet", tmp_path / "stopped.parquet"
    more = ("--landmarks", "70")
    assert main.run(command(tmp_path, whole, *more)) == 0
    arguments = command(tmp_path, stopped, *more)
    work = stopped.with_name(stopped.name + ".work")
    with TrainerProcess(arguments, tmp_path / "out.txt", slow_groups) as process:
        deadline = time.monotonic() + 100
        while not list(work.glob("landmark-*[0-9].npy")):
            assert process.running and time.monotonic() < deadline, process.text
            time.sleep(0.01)
        process.signal(signal.SIGTERM)
        assert process.wait() == 75, process.text
    kept = {path: path.stat().st_mtime_ns for path in work.glob("*.npy")}
    assert kept and not stopped.exists()
    made: list[str] = []
    keep = PartFiles.keep

    def noting(self: PartFiles, name: str, part: torch.Tensor) -> torch.Tensor:
        made.append(name)
        return keep(self, name, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartFiles, "keep", noting)
        assert main.run(arguments) == 0
    assert made and not {path.stem for path in kept} & set(made), "nothing is computed twice"
    tables = [pyarrow.parquet.read_table(path) for path in (whole, stopped)]
    assert tables[0].equals(tables[1])


def slow_groups() -> None:
    """So that a signal finds the command at work."""
    group = measure.Measure._group

    def slow(self: Any, *args: Any) -> torch.Tensor:
        time.sleep(0.3)
        return group(self, *args)

    measure.Measure._group = slow  # type: ignore[method-assign]


def test_parts_of_another_question_are_thrown_away(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    PartFiles(folder, "a").keep("x", torch.ones(2))
    assert PartFiles(folder, "a").find("x") is not None
    assert PartFiles(folder, "b").find("x") is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--target", "DATA"), "is also among the targets"),
        (("--parameters", "nothing"), "no trained parameter's name matches 'nothing'"),
        (("more.jsonl",), "is not a setting: give only one DATA"),
        (("--landmark", "3"), "unrecognized arguments"),
        (("data.sequence=3",), "there is no setting 'data.sequence'"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [text.replace("DATA", str(tmp_path / "data.jsonl")) for text in more]
    assert main.run([*command(tmp_path, tmp_path / "out.parquet"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_loss_on_ids_that_a_step_chooses_is_refused() -> None:
    settings = compose(["data=movie_reviews", "distillation=classification", "teacher.url=http://none"])
    with pytest.raises(ValueError, match="so it can't weight documents"):
        influence._objective(settings, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("student", ["student=bitnet", "student=diffusion"])
def test_every_student_is_measured(tmp_path: Path, student: str) -> None:
    out = tmp_path / "weighted.parquet"
    more = [student, "--landmarks", "40"]
    if student == "student=diffusion":
        more += ["student.diffusion.mask_token_id=511", "student.diffusion.block_size=4", "data.seq_len=48"]
    assert main.run(command(tmp_path, out, *more)) == 0
    rows = pyarrow.parquet.read_table(out).to_pylist()
    assert len(rows) == 120 and all(row["influence"] is not None for row in rows)

"""Several ranks, each a trainer in a process of its own, gloo between them, and the real service with the scripted
engine for a teacher: they are one rank that accumulates over as many micro batches, bit for bit.

The one figure that may differ is the gradient's norm: over shards it is summed in another order, and so is the clipping
by it. What is compared bit for bit runs without clipping; with it the bound is 1e-6 of the loss.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer.checkpoint import checkpoints as checkpoint
from student_trainer.cli.export import main as export
from tests import block_diffusion, mixture_policy
from tests.ranks_run import ranks, train_ranks
from tests.teacher_process import TeacherProcess, free_port
from tests.trainer_run import (
    SIGKILL,
    SIGTERM,
    Workshop,
    final_files,
    lines_of,
    steps_of,
    teacher_script,
    trace_of,
    train,
    wait_for_step,
)

STEPS = 8
# Rows of a pass: two for one rank that takes two passes a step, all its own for each of two ranks.
ONE, UNCLIPPED = "optim.micro_batch_rows=2", "optim.clip_norm=1e6"
MUON = ("optim=muon_clip", "optim.qk_clip.tau=0.3", "optim.learning_rate=0.02", UNCLIPPED)
ADAMW = (UNCLIPPED,)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess(script=teacher_script()) as process:
        yield process


def arguments(workshop: Workshop, root: Path, teacher: TeacherProcess, *overrides: str) -> list[str]:
    return workshop.settings(root, f"run.steps={STEPS}", "evaluation.every=4", *overrides, url=teacher.url)


def run_on(world: int, root: Path, settings: list[str], prelude: Callable[[int], None] | None = None) -> Path:
    """`prelude` is run first on each rank, given its number."""
    root.mkdir(exist_ok=True)
    if world == 1:
        first = None if prelude is None else partial(prelude, 0)
        assert train([*settings, ONE], root / "output", first) == 0, (root / "output").read_text()
    else:
        texts = [root / f"output-{rank}" for rank in range(world)]
        codes = train_ranks(world, settings, root / "output", prelude)
        assert codes == [0] * world, [text.read_text() for text in texts]
    return root / "run"


def go_on(
    world: int, begun: Path, root: Path, workshop: Workshop, teacher: TeacherProcess, settings: tuple[str, ...],
    prelude: Callable[[int], None] | None = None,
) -> Path:  # fmt: skip
    """A copy of a finished run in `root` without its last checkpoint, brought to its end by `world` ranks."""
    shutil.copytree(begun, root / "run")
    shutil.rmtree(root / "run" / "checkpoints" / f"step-{STEPS:08d}")
    return run_on(world, root, arguments(workshop, root, teacher, *settings), prelude)


@pytest.fixture(scope="module", params=[ADAMW, MUON], ids=["adamw", "muon_clip"])
def pair(
    request: Any, workshop: Workshop, teacher: TeacherProcess, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, tuple[str, ...]]:
    """The folders of the same run on one rank and on two, and its settings."""
    root = tmp_path_factory.mktemp("pair")
    one, two = (
        run_on(world, root / name, arguments(workshop, root / name, teacher, *request.param))
        for world, name in ((1, "one"), (2, "two"))
    )
    return one, two, request.param


def without_norm(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "grad_norm"} for line in trace_of(folder)]


def assert_same(folder: Path, other: Path) -> None:
    assert without_norm(folder) == without_norm(other)
    norms = [[line["grad_norm"] for line in lines_of(run)] for run in (folder, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert final_files(folder, STEPS) == final_files(other, STEPS)
    assert lines_of(folder, "evaluation.jsonl") == lines_of(other, "evaluation.jsonl")


def test_two_ranks_are_one_rank_that_accumulates_bit_for_bit(pair: tuple[Path, Path, tuple[str, ...]]) -> None:
    """Losses by term and source, token counts, rates, the largest attention logit; parameters and moments; held out."""
    one, two, settings = pair
    assert_same(one, two)
    assert lines_of(two)[-1]["loss"] < lines_of(two)[0]["loss"]
    if settings is MUON:
        assert any(line["attention/clipped_heads"] for line in lines_of(two)), "the tau of this test must bite"
    assert (one / "passage.json").read_text() == (two / "passage.json").read_text()


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_two_ranks_loads_on_one_and_back(
    pair: tuple[Path, Path, tuple[str, ...]], workshop: Workshop, teacher: TeacherProcess, tmp_path: Path, world: int
) -> None:
    one, two, settings = pair
    assert_same(go_on(world, two if world == 1 else one, tmp_path, workshop, teacher, settings), one)


def test_clipping_by_the_norm_over_shards_moves_the_loss_by_rounding_alone(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    clipped = ("optim.clip_norm=0.1", "evaluation.every=0")
    one, two = (
        run_on(world, tmp_path / str(world), arguments(workshop, tmp_path / str(world), teacher, *clipped))
        for world in (1, 2)
    )
    losses = [[line["loss"] for line in lines_of(run)] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("pair", [ADAMW], ids=["adamw"], indirect=True)
def test_one_process_exports_what_two_ranks_trained(pair: tuple[Path, Path, tuple[str, ...]], tmp_path: Path) -> None:
    one, two, _ = pair
    written = []
    for run, name in ((one, "one"), (two, "two")):
        assert export([str(run), "--format", "hf", "--out", str(tmp_path / name), "--skip-check"]) == 0
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("pair", [ADAMW], ids=["adamw"], indirect=True)
def test_a_signal_on_one_rank_stops_all_between_updates_and_loses_no_step(
    pair: tuple[Path, Path, tuple[str, ...]], workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    one, _, settings = pair
    given = arguments(workshop, tmp_path, teacher, *settings)
    with ranks(2, given, tmp_path / "output") as trainers:
        wait_for_step(tmp_path / "run", 2, trainers[0])
        trainers[1].signal(SIGTERM)
        assert [trainer.wait() for trainer in trainers] == [75, 75]
    kept = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert kept is not None and kept.step == steps_of(tmp_path / "run")[-1]
    run_on(2, tmp_path, given)
    assert_same(tmp_path / "run", one)


def spoil_second_step(rank: int) -> None:
    """Hidden states of rank 1 that are not numbers, from its second update on: nothing from outside can do that."""
    if rank == 0:
        return
    from student_trainer.students.student import Student

    healthy, passes = Student.hidden, []

    def spoilt(self: Student, micro: Any, **options: Any) -> torch.Tensor:
        passes.append(micro)
        return healthy(self, micro, **options) * (float("nan") if len(passes) > 1 else 1.0)

    Student.hidden = spoilt  # type: ignore[method-assign]


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    given = arguments(workshop, tmp_path, teacher, "evaluation.every=0", "checkpoint.every=1")
    with ranks(2, given, tmp_path / "output", spoil_second_step) as trainers:
        assert [trainer.wait() for trainer in trainers] == [1, 1]
        texts = [trainer.text for trainer in trainers]
    assert all("step 2 is not finite" in text and "was not made" in text for text in texts), texts
    assert "on rank 1 of 2, " in texts[1] and " is nan in source " in texts[1]
    assert steps_of(tmp_path / "run") == [1]
    kept = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert kept is not None and kept.step == 1


def test_a_rank_that_is_killed_ends_the_others_and_the_message_says_so(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    given = arguments(workshop, tmp_path, teacher, "run.steps=4000", "evaluation.every=0")
    with ranks(2, given, tmp_path / "output") as trainers:
        wait_for_step(tmp_path / "run", 3, trainers[0])
        trainers[1].signal(SIGKILL)
        assert trainers[0].wait() == 1
        assert "stillhouse-train: another rank is gone" in trainers[0].text and "Traceback" not in trainers[0].text


def die_in_the_second_save(rank: int) -> None:
    """Rank 1, when its second shard is written and not yet forced to the disk."""
    if rank == 0:
        return
    from student_trainer.checkpoint import files

    seal, sealed = files.seal, []

    def dying(path: Path) -> dict[str, Any]:
        sealed.append(path)
        if len(sealed) == 2:
            os.kill(os.getpid(), SIGKILL)
        return seal(path)

    files.seal = dying


@pytest.mark.parametrize("pair", [ADAMW], ids=["adamw"], indirect=True)
def test_ranks_go_on_from_the_checkpoint_before_the_one_that_a_rank_was_killed_in(
    pair: tuple[Path, Path, tuple[str, ...]], workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    one, _, settings = pair
    given = arguments(workshop, tmp_path, teacher, *settings)
    assert train_ranks(2, given, tmp_path / "output", die_in_the_second_save) == [1, -SIGKILL]
    kept = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert kept is not None and kept.step == STEPS // 2 < steps_of(tmp_path / "run")[-1]
    run_on(2, tmp_path, given)
    assert_same(tmp_path / "run", one)


def test_ranks_without_a_teacher_give_up_together_and_save_what_they_have(workshop: Workshop, tmp_path: Path) -> None:
    with TeacherProcess(script=teacher_script()) as teacher:
        given = arguments(
            workshop, tmp_path, teacher, "run.steps=4000", "checkpoint.every=0", "teacher.outage_timeout_s=2",
            "evaluation.every=0",
        )  # fmt: skip
        with ranks(2, given, tmp_path / "output") as trainers:
            wait_for_step(tmp_path / "run", 3, trainers[0])
            teacher.signal(SIGKILL)
            codes = [trainer.wait() for trainer in trainers]
            assert codes == [75, 75], [trainer.text for trainer in trainers]
    kept = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert kept is not None and kept.step == steps_of(tmp_path / "run")[-1] >= 3


def test_rows_that_do_not_divide_evenly_stop_all(workshop: Workshop, teacher: TeacherProcess, tmp_path: Path) -> None:
    assert train_ranks(2, arguments(workshop, tmp_path, teacher, "data.rows=3"), tmp_path / "output") == [2, 2]
    assert "rows must divide evenly" in (tmp_path / "output-1").read_text()


def test_a_mixture_that_follows_the_losses_is_the_same_on_two_ranks(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    """What the first rank decides holds for all; so does what a checkpoint of either kind kept of it."""
    given = (UNCLIPPED, "data.mixture.lag=2", "checkpoint.every=4")
    install = mixture_policy.install
    one, two = (
        run_on(world, tmp_path / str(world), arguments(workshop, tmp_path / str(world), teacher, *given), install)
        for world in (1, 2)
    )
    assert_same(one, two)
    assert len({line["mixture/a"] for line in lines_of(two)}) == STEPS - 1
    for world, begun in ((1, two), (2, one)):
        assert_same(go_on(world, begun, tmp_path / f"on-{world}", workshop, teacher, given, install), one)


EVERY = ("data.mixture.lag=2", "data.mixture.update_interval=2", "checkpoint.every=3")
PROBED = ("data.mixture.policy=influence", "data.mixture.probe=a", "data.mixture.sketch_steps=2",
          "data.mixture.sketch_size=256", "data.held_out_rows=4")  # fmt: skip
POLICIES = {
    "excess": ("data.mixture.policy=excess",),
    "divergence": ("data.mixture.policy=divergence", "data.mixture.form=exponentiated"),
    "ado": ("data.mixture.policy=ado",),
    "influence": PROBED,
    "influence, preconditioned": (*PROBED, "data.mixture.precondition=true"),
    "influence on ternary": (*PROBED, "student=bitnet", "student.quantisation.warmup_steps=4"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_decides_alike_on_two_ranks(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path, name: str
) -> None:
    given = (UNCLIPPED, *EVERY, *POLICIES[name])
    one, two = (
        run_on(world, tmp_path / str(world), arguments(workshop, tmp_path / str(world), teacher, *given))
        for world in (1, 2)
    )
    assert_same(one, two)
    decided = [line["decided/a"] for line in lines_of(two) if "decided/a" in line]
    assert len(decided) == (1 if name == "ado" else STEPS // 2) and decided[-1] != 0.5
    assert_same(go_on(2, one, tmp_path / "on", workshop, teacher, given), one)


OWN_TEXT = ("on_policy=gkd", "on_policy.share=0.6", "on_policy.prompt_tokens=6", "on_policy.new_tokens=10",
            "teacher.sanity=off")  # fmt: skip
BALANCED = "distillation.balance.shares={cross_entropy: 1, top_k_kl: 1}"
BESIDE = {  # what a rank does with the whole student beside the passes that all ranks make, and students of other kinds
    "writes": (*OWN_TEXT, "on_policy.lag=2"),
    "gathers": ("distillation.terms.top_k_kl.kind=reverse_kl", "distillation.terms.top_k_kl.support=gather"),
    "balances": (BALANCED, "distillation.balance.every=3"),
    "writes, gathers, balances": (*OWN_TEXT, "on_policy.terms.jsd.support=gather", BALANCED),
    "lora": ("student.lora.rank=4",),
    "ternary": ("student=bitnet", "student.quantisation.warmup_steps=4", UNCLIPPED),  # a bit more flips a weight
    "lora on ternary": ("student=bitnet", "student.lora.rank=4", UNCLIPPED),
    "complex": ("student=fairy2i", "student.quantisation.warmup_steps=4", UNCLIPPED),
    "two bits, learnt scales": ("student=seq2", "student.quantisation.warmup_steps=4", UNCLIPPED),
    "lora on two bits": ("student=seq2", "student.lora.rank=4", UNCLIPPED),
    "lrc": ("student=lrc", "student.quantisation.bits=3", "student.lrc.sequences=8"),
}


def assert_close(folder: Path, other: Path, rel: float = 1e-5) -> None:
    """The figures of a step within rounding: the norm over shards scales the gradient, and writing pads by rank."""
    for line, expected in zip(without_norm(folder), without_norm(other), strict=True):
        assert line == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("name", BESIDE)
def test_what_a_rank_does_beside_the_others_is_what_one_rank_does(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path, name: str
) -> None:
    given = (*BESIDE[name], "evaluation.samples=0")
    one, two = (
        run_on(world, tmp_path / str(world), arguments(workshop, tmp_path / str(world), teacher, *given))
        for world in (1, 2)
    )
    assert_close(two, one)
    for world, begun in ((1, two), (2, one)):
        assert_close(go_on(world, begun, tmp_path / f"on-{world}", workshop, teacher, given), one)


GATHER = ("distillation.terms.top_k_kl.support=gather", "distillation.terms.top_k_kl.kind=reverse_kl")
VIEWS = {name: (f"student.architecture={name}", *GATHER) for name in block_diffusion.TOYS} | {
    # A mask token more than two ranks can share alike.
    "diffusion": ("student=diffusion", "student.diffusion.block_size=4", "distillation=tcs"),
    "diffusion that grows and looks ahead": (
        "student=diffusion",
        "student.diffusion.block_size=4",
        "student.diffusion.growth.every=2",
        "distillation=tcs",
        "student.diffusion.clean_half=causal",
        "distillation.terms.autoregressive.coefficient=0.5",
        "distillation.lookahead.window=2",
        "distillation.lookahead.candidates=3",
        "distillation.lookahead.positions=4",
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_student_with_views_of_its_own_is_one_student_on_two_ranks(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path, name: str
) -> None:
    """Two passes for each part of a batch, whose gradients ranks add up in another order: what rounding makes of that
    grows with the steps, differently on each kind of CPU.
    """
    given = (*VIEWS[name], "evaluation.samples=0")
    one, two = (
        run_on(world, tmp_path / str(world), arguments(workshop, tmp_path / str(world), teacher, *given),
               block_diffusion.plug_in)
        for world in (1, 2)
    )  # fmt: skip
    assert_close(two, one, rel=3e-4)
    assert without_norm(two)[0] == pytest.approx(without_norm(one)[0], rel=1e-6)
    for line, expected in zip(lines_of(two, "evaluation.jsonl"), lines_of(one, "evaluation.jsonl"), strict=True):
        # One rank also tells how a diffusion student decodes, which several don't.
        alike = {figure: expected["a"][figure] for figure in line["a"]}
        assert line["a"] == pytest.approx(alike, rel=3e-4) and line["a"]["tokens"] == expected["a"]["tokens"]
    shown = [[entry["text"] for entry in json.loads((run / "passage.json").read_text())] for run in (one, two)]
    assert shown[0] == shown[1] != []
    assert_close(go_on(1, two, tmp_path / "on-1", workshop, teacher, given, block_diffusion.plug_in), one, rel=3e-4)
    assert_close(go_on(2, one, tmp_path / "on-2", workshop, teacher, given, block_diffusion.plug_in), one, rel=3e-4)


def no_prompt_for_second_rank(rank: int) -> None:
    """Of every other batch: documents that give one rank no prompt and the other some are rare."""
    if rank == 0:
        return
    from student_trainer.rollouts import rollouts as written

    found = written.prompts_of

    def seldom(batch: Any, *more: Any) -> Any:
        return () if batch.number % 2 else found(batch, *more)

    written.prompts_of = seldom


def test_a_rank_that_has_nothing_to_write_takes_its_part_in_the_update(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    given = arguments(workshop, tmp_path, teacher, *OWN_TEXT, "on_policy.share=1", "evaluation.samples=0")
    assert train_ranks(2, given, tmp_path / "output", no_prompt_for_second_rank) == [0, 0]
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    mean = [statistics.mean(line["on_policy/sequences"] for line in lines[first::2]) for first in (0, 1)]
    assert mean[1] < 0.75 * mean[0] and all(line["tokens"] > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pair", [ADAMW], ids=["adamw"], indirect=True)
def test_torchrun_starts_them(
    pair: tuple[Path, Path, tuple[str, ...]], workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    one, _, settings = pair
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "student_trainer.main", *arguments(workshop, tmp_path, teacher, *settings)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", one)


# As `stillhouse-train` would, and says at the very end of the interpreter that it came to that.
ENDING = """
import atexit, sys
from student_trainer.main import main
atexit.register(print, "taken apart")
main(sys.argv[1:])
"""


def test_the_interpreter_of_a_rank_is_not_taken_apart_under_threads_that_outlive_the_group(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    given, port = arguments(workshop, tmp_path, teacher, "run.steps=2", "evaluation.every=0"), free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ENDING, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "taken apart" not in said, said
    assert steps_of(tmp_path / "run") == [1, 2]

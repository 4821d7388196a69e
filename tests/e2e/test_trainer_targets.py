"""The trainer and every kind of target, over HTTP from the real service: a student that is the teacher has nothing to
learn, whatever it is asked for, and a run that was cut in two learns the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.cli.compose import compose
from student_trainer.data.loader import BatchSource
from tests.teacher_process import TeacherProcess
from tests.trainer_run import Workshop, final_files, lines_of, teacher_script, trace_of, train

TEMPERATURES = (1.0, 2.0, 5.0)
NOTHING = {
    f"{kind}_{support}_{temperature:g}": {"kind": kind, "support": support, "temperature": temperature}
    for kind, support in (("forward_kl", "full"), ("reverse_kl", "full"), ("reverse_kl", "gather"), ("jsd", "gather"))
    for temperature in TEMPERATURES
}


def terms(named: dict[str, dict[str, Any]]) -> list[str]:
    """These losses and no other."""
    fields = [(name, *item) for name, settings in named.items() for item in settings.items()]
    return ["distillation=none", *(f"distillation.terms.{name}.{field}={value}" for name, field, value in fields)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def itself(workshop: Workshop) -> Iterator[TeacherProcess]:
    """The student's own checkpoint, served."""
    options = (str(workshop.student), "--engine", "hf", "--dtype", "float32")
    with TeacherProcess(*options, wait=False) as teacher:
        teacher.wait_ready(timeout_s=240)
        yield teacher


@pytest.fixture(scope="module")
def scripted() -> Iterator[TeacherProcess]:
    with TeacherProcess(script=teacher_script()) as teacher:
        yield teacher


def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    workshop: Workshop, itself: TeacherProcess, tmp_path: Path
) -> None:
    """But from samples, whose cross-entropy is then the teacher's entropy in the mean over draws."""
    losses = NOTHING | {"drawn": {"kind": "sampled"}}
    arguments = workshop.settings(
        tmp_path, "run.steps=1", "distillation.samples=400", "teacher.sanity=off", *terms(losses), url=itself.url
    )
    assert train(arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    (line,) = lines_of(tmp_path / "run")
    learnt = {name: line[f"loss/{name}"] for name in NOTHING}
    assert max(map(abs, learnt.values())) < 2e-5, learnt
    assert line["loss/drawn"] == pytest.approx(mean_entropy(workshop, arguments), rel=0.02)


def mean_entropy(workshop: Workshop, arguments: list[str]) -> float:
    """Of the student's own distributions over the rows of batch 0 that count."""
    settings = compose(arguments)
    source = BatchSource(settings.data, AutoTokenizer.from_pretrained(workshop.student), settings.run.seed)
    batch, _ = source.batch(source.initial_state(), 0)
    source.close()
    model = AutoModelForCausalLM.from_pretrained(workshop.student)
    entropies = []
    for d in batch.documents:
        with torch.no_grad():
            z_TV = model(torch.from_numpy(batch.tokens_BT[d.row, d.start : d.stop])[None].long()).logits[0]
        entropy_T = torch.distributions.Categorical(logits=z_TV.double()).entropy()
        entropies.append(entropy_T[torch.from_numpy(batch.loss_mask_BT[d.row, d.start : d.stop])])
    return float(torch.cat(entropies).mean())


SUPPORTS = ("full", "gather", "sampled")


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_run_cut_in_two_learns_the_same_to_the_last_bit(
    workshop: Workshop, scripted: TeacherProcess, tmp_path: Path, support: str
) -> None:
    loss = {"d": {"kind": "sampled" if support == "sampled" else "jsd", "support": support, "temperature": 2.0}}
    settings = ("run.steps=8", "optim.micro_batch_rows=2", "teacher.top_k=4", *terms(loss))
    for root, stops in (("straight", [8]), ("cut", [4, 8])):
        for steps in stops:
            more = (f"run.steps={steps}", "run.allow_changes=[run.steps]", "optim.schedule.kind=constant")
            arguments = workshop.settings(tmp_path / root, *settings, *more, url=scripted.url)
            assert train(arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert trace_of(tmp_path / "cut" / "run") == trace_of(tmp_path / "straight" / "run")
    assert final_files(tmp_path / "cut" / "run", 8) == final_files(tmp_path / "straight" / "run", 8)
    losses = [line["loss/d"] for line in lines_of(tmp_path / "cut" / "run")]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_balance_and_schedule_in_a_run_and_across_a_cut(
    workshop: Workshop, scripted: TeacherProcess, tmp_path: Path
) -> None:
    terms, balance = "distillation.terms", "distillation.balance"
    settings = (
        "run.steps=8", "distillation=logits_only", "optim.micro_batch_rows=2", "optim.schedule.kind=constant",
        f"{terms}.cross_entropy.schedule=[[0,1],[8,0.5]]", f"{balance}.shares={{cross_entropy:1,top_k_kl:3}}",
        f"{balance}.every=3", "run.allow_changes=[run.steps]",
    )  # fmt: skip
    for root, stops in (("straight", [8]), ("cut", [4, 8])):
        for steps in stops:
            arguments = workshop.settings(tmp_path / root, *settings, f"run.steps={steps}", url=scripted.url)
            assert train(arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    lines = lines_of(tmp_path / "straight" / "run")
    assert trace_of(tmp_path / "cut" / "run") == trace_of(tmp_path / "straight" / "run")
    measured = [line["step"] for line in lines if "gradient_share/top_k_kl" in line]
    assert measured == [1, 4, 7]
    assert lines[0]["gradient_share/top_k_kl"] == pytest.approx(0.75)
    for line in lines:
        factor = 1 - 0.5 * (line["step"] - 1) / 8
        assert line["coefficient/cross_entropy"] == pytest.approx(0.5 * factor)
        assert line["weighted/top_k_kl"] == pytest.approx(line["coefficient/top_k_kl"] * line["loss/top_k_kl"])

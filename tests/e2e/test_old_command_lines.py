"""The quick start of an older trainer, line by line, by its own names: each trains two steps of a tiny student.

Local folders stand where the hub would be asked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.test_attention_term import attention_of
from tests.models import save_tiny_llama
from tests.teacher_process import ServiceProcess, TeacherProcess
from tests.trainer_run import Workshop, lines_of, train


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("original") / "model", seed=7)


@pytest.fixture(scope="module")
def student(workshop: Workshop, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose model card says what it was made of."""
    folder = tmp_path_factory.mktemp("student") / "model"
    shutil.copytree(workshop.student, folder)
    (folder / "README.md").write_text(f"---\nbase_model: {original}\n---\n\n# A student\n")
    return folder


@pytest.fixture(scope="module")
def served(original: Path) -> Iterator[TeacherProcess]:
    with TeacherProcess(str(original), "--engine=hf", "--dtype=float32") as process:
        yield process


@pytest.fixture(scope="module")
def attention(original: Path) -> Iterator[ServiceProcess]:
    with attention_of(original) as process:
        yield process


class Outcome:
    """What a command line said and wrote."""

    def __init__(self, folder: Path, said: str):
        self.folder, self.said = folder, said
        self.settings: dict[str, Any] = yaml.safe_load((folder / "settings.yaml").read_text())
        self.lines = lines_of(folder)


def run(workshop: Workshop, root: Path, *line: str, data: bool = True) -> Outcome:
    """Two steps; of a test's own is only what makes the run small, and the data where the line has none."""
    small = [
        each
        for each in workshop.settings(root, "run.steps=2", "checkpoint.every=0", "teacher.sanity=off")
        if not each.startswith("student.checkpoint") and (data or not each.startswith("data.sources"))
    ]
    code = train([*line, *small], root / "output")
    said = (root / "output").read_text()
    assert code == 0, said
    outcome = Outcome(root / "run", said)
    assert [each["step"] for each in outcome.lines] == [1, 2], said
    return outcome


def test_a_checkpoint_alone_is_taught_by_its_original_model(
    workshop: Workshop, student: Path, original: Path, tmp_path: Path
) -> None:
    ran = run(workshop, tmp_path, f"student.checkpoint_path={student}")
    assert (ran.settings["teacher"]["kind"], ran.settings["teacher"]["model"]) == ("local", str(original))
    assert f"teacher: {original}, the student's original model according to base_model of its model card" in ran.said
    assert ran.lines[0]["loss/top_k_kl"] > 0
    assert "data.seq_len is 48 (the recipe uses 2,048), optim.kind is adamw (the recipe uses Muon" in ran.said


def test_a_local_teacher_by_name(workshop: Workshop, original: Path, tmp_path: Path) -> None:
    line = (f"student.checkpoint_path={workshop.student}", f"teacher.model_name={original}")
    ran = run(workshop, tmp_path, *line)
    assert f"{line[1]} is now teacher=local teacher.model={original}" in ran.said
    assert (ran.settings["teacher"]["kind"], ran.settings["teacher"]["model"]) == ("local", str(original))


def test_a_served_teacher(workshop: Workshop, served: TeacherProcess, tmp_path: Path) -> None:
    ran = run(
        workshop, tmp_path, f"student.checkpoint_path={workshop.student}", "teacher.use_vllm=true",
        f"teacher.vllm_url={served.url}", "teacher.model_name=meta-llama/Llama-3.2-3B",
    )  # fmt: skip
    assert f"teacher.vllm_url={served.url} is now teacher=remote teacher.url={served.url}" in ran.said
    assert (
        "teacher.model_name=meta-llama/Llama-3.2-3B is now unnecessary: the teacher at teacher.url reports" in ran.said
    )
    assert (ran.settings["teacher"]["kind"], ran.settings["teacher"]["url"]) == ("remote", [served.url])


@pytest.mark.parametrize("loss", ["bitdistill", "logits_only"])
def test_the_presets(workshop: Workshop, student: Path, attention: ServiceProcess, tmp_path: Path, loss: str) -> None:
    beside = [f"teacher.attention_url={attention.url}", "distillation.attention.relation_heads=8"]
    line = [f"student.checkpoint_path={student}", f"distillation={loss}", *(beside if loss == "bitdistill" else [])]
    ran = run(workshop, tmp_path, *line)
    expected = {"bitdistill": (10.0, 1e5, 5.0), "logits_only": (1.0, None, 1.0)}[loss]
    names = ("lambda_logits", "gamma_attention", "temperature")
    assert tuple(ran.settings["distillation"][name] for name in names) == expected
    assert ("loss/attention" in ran.lines[0]) == (loss == "bitdistill")


@pytest.mark.parametrize(
    ("kind", "made"),
    [("dlm", ("diffusion", "none")), ("bitnet", ("causal", "bitnet")), ("auto", ("causal", "none"))],
)
def test_kinds_of_students(
    workshop: Workshop, original: Path, student: Path, tmp_path: Path, kind: str, made: tuple[str, str]
) -> None:
    """What is made of a checkpoint here is taught by that; what is taken as it is, by the one that its card names."""
    checkpoint = student if kind == "auto" else original
    loss = ["distillation=tcs"] if kind == "dlm" else []
    ran = run(workshop, tmp_path, f"student.checkpoint_path={checkpoint}", f"student.type={kind}", *loss)
    named = ran.settings["student"]
    if kind != "auto":
        assert (named["architecture"], named["quantiser"]) == made
    else:
        assert "student.type=auto: " in ran.said and "student.quantiser=none" in ran.said
    assert ran.settings["teacher"]["model"] == str(original)
    assert all(each["loss"] > 0 for each in ran.lines)


def test_target_concrete_scores(workshop: Workshop, original: Path, tmp_path: Path) -> None:
    """The original of a student that is made here is the checkpoint itself."""
    ran = run(
        workshop, tmp_path, f"student.checkpoint_path={original}", "student=diffusion", "distillation=tcs",
        "distillation.lambda_logits=3",
    )  # fmt: skip
    assert ran.settings["teacher"]["model"] == str(original)
    assert ran.settings["distillation"]["terms"]["tcs"]["coefficient"] == 3.0 and ran.lines[0]["loss/tcs"] > 0


def test_classification(workshop: Workshop, student: Path, attention: ServiceProcess, tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    rows = ({"text": f"the still number {n}", "label": n % 2} for n in range(60))
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = run(
        workshop, tmp_path, f"student.checkpoint_path={student}", "distillation=classification", "data=classification",
        f"data.sources.examples.path={examples}", 'data.sources.examples.labels={0: a, 1: "b"}',
        f"teacher.attention_url={attention.url}", "distillation.attention.relation_heads=8", data=False,
    )  # fmt: skip
    assert ran.lines[0]["loss/label_kl"] >= 0 and "loss/attention" in ran.lines[0]
    assert ran.settings["distillation"]["terms"]["label_kl"]["temperature"] == 5.0


def test_coefficients_by_their_names(
    workshop: Workshop, student: Path, attention: ServiceProcess, tmp_path: Path
) -> None:
    ran = run(
        workshop, tmp_path, f"student.checkpoint_path={student}", "distillation.lambda_logits=7",
        "distillation.gamma_attention=1e4", "distillation.temperature=3", f"teacher.attention_url={attention.url}",
        "distillation.attention.relation_heads=8",
    )  # fmt: skip
    assert (
        "distillation.gamma_attention is given, but no distillation is chosen: using distillation=bitdistill"
        in ran.said
    )
    loss = ran.settings["distillation"]
    assert (loss["terms"]["top_k_kl"]["coefficient"], loss["terms"]["top_k_kl"]["temperature"]) == (7.0, 3.0)
    assert loss["attention"]["coefficient"] == 1e4 and loss["gamma_attention"] == 1e4
    first = ran.lines[0]
    for name, coefficient in (("top_k_kl", 7.0), ("attention", 1e4)):
        assert first[f"weighted/{name}"] == pytest.approx(coefficient * first[f"loss/{name}"], rel=1e-5)


def test_muon_with_clipping(workshop: Workshop, student: Path, tmp_path: Path) -> None:
    ran = run(
        workshop, tmp_path, f"student.checkpoint_path={student}", "optimizer.type=muon",
        "optimizer.enable_clipping=true", "optimizer.lr=1e-3",
    )  # fmt: skip
    assert "optimizer.type=muon is now optim=muon_clip" in ran.said
    assert "optimizer.enable_clipping=true is now optim.qk_clip.tau=100.0" in ran.said
    optim = ran.settings["optim"]
    assert (optim["kind"], optim["qk_clip"]["tau"]) == ("muon_clip", 100.0)
    assert "attention/largest_logit" in ran.lines[0] and "optim.kind is" not in ran.said


def test_the_mixture_for_pretraining(workshop: Workshop, student: Path, tmp_path: Path) -> None:
    """Its three data sets lie in folders that look like theirs on the hub."""
    line = [f"student.checkpoint_path={student}", "data.config_name=mixed_pretrain"]
    for source, subset in (("web", "sample-10BT"), ("textbooks", "cosmopedia-v2"), ("mathematics", "finemath-4plus")):
        folder = tmp_path / source
        folder.mkdir()
        rows = ({"text": f"The still takes a wash and gives a spirit, said {source} {n}"} for n in range(80))
        (folder / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        front = {"configs": [{"config_name": subset, "data_files": [{"split": "train", "path": "part.jsonl"}]}]}
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n")
        line.append(f"data.sources.{source}.name={folder}")
    ran = run(workshop, tmp_path, *line, data=False)
    assert "data.config_name=mixed_pretrain is now data=mixed_pretrain" in ran.said
    weights = {name: source["weight"] for name, source in ran.settings["data"]["sources"].items()}
    assert weights == {"web": 0.7, "textbooks": 0.2, "mathematics": 0.1}

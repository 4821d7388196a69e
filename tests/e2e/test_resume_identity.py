"""A run goes on with the teacher, the student's config and the tokenizer that it began with, or says what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from student_trainer.targets.expected import expected
from teacher_proto.errors import WrongTeacherError
from tests.teacher_process import TeacherProcess
from tests.trainer_run import Workshop, final_files, steps_of, teacher_script, trace_of, train

MORE = ("run.steps=8", "checkpoint.every=4", "run.allow_changes=[run.steps]")
OTHER = {"semantic.weights": '{"scripted": "another"}'}


@pytest.fixture(scope="module")
def begun(workshop: Workshop, teacher: TeacherProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that stands at step 4."""
    root = tmp_path_factory.mktemp("begun")
    assert train(workshop.settings(root, *MORE, "run.steps=4", url=teacher.url), root / "log") == 0
    return root


@pytest.fixture()
def root(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun / "run", tmp_path / "root" / "run")
    return tmp_path / "root"


def resume(workshop: Workshop, root: Path, url: str, *overrides: str) -> tuple[int, str]:
    """Exit code, and what was said."""
    log = root / "log.txt"
    code = train(workshop.settings(root, *MORE, *overrides, url=url), log)
    return code, log.read_text()


def refused(code: int, text: str, root: Path) -> None:
    assert code == 2 and "Traceback" not in text, text
    assert steps_of(root / "run") == [1, 2, 3, 4]


def test_naming_another_teacher_is_refused_and_may_be_allowed(
    workshop: Workshop, teacher: TeacherProcess, root: Path
) -> None:
    with TeacherProcess(script=teacher_script(identity=OTHER)) as other:
        named = f"teacher.fingerprint={other.fingerprint}"
        code, text = resume(workshop, root, other.url, named)
        refused(code, text, root)
        assert other.fingerprint in text and teacher.fingerprint in text and "run.allow_changes" in text
        # The one that it began with may be named, and is still held against all that is known of it.
        code, text = resume(workshop, root, other.url, f"teacher.fingerprint={teacher.fingerprint}")
        refused(code, text, root)
        assert "semantic.weights" in text
        code, text = resume(workshop, root, other.url, named, "run.allow_changes=[run.steps,teacher.fingerprint]")
        assert code == 0 and "teacher may differ from" in text, text
    assert steps_of(root / "run") == list(range(1, 9))


def test_a_named_fingerprint_does_not_do_away_with_the_canary(
    workshop: Workshop, teacher: TeacherProcess, root: Path
) -> None:
    with TeacherProcess(script=teacher_script(noise=1e-2)) as damaged:
        assert damaged.fingerprint == teacher.fingerprint
        code, text = resume(workshop, root, damaged.url, f"teacher.fingerprint={damaged.fingerprint}")
    refused(code, text, root)
    assert "canary" in text


def test_other_rounding_may_be_named_and_has_the_same_canary() -> None:
    saved = {"name": "big", "fingerprint": "a.1", "identity": None, "canary": [0.5]}
    with pytest.raises(WrongTeacherError, match=r"began with the teacher big \(a\.1\).*names another, b\.1"):
        expected("b.1", saved)
    fingerprint, canary = expected("a.2", saved)
    assert fingerprint == "a.2" and canary is not None and canary.logprobs == (0.5,)


def test_several_teachers_are_held_against_the_checkpoint_whatever_is_named(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    def members(*urls: str) -> list[str]:
        return [
            "teacher.kind=mixed",
            *(f"teacher.members.{name}.url={url}" for name, url in zip("xy", urls, strict=True)),
        ]

    root = tmp_path / "root"
    begun = workshop.settings(root, *MORE, "run.steps=4", *members(teacher.url, teacher.url))
    assert train(begun, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    weighed = [*members(teacher.url, teacher.url), "teacher.members.x.weight=3", "teacher.fingerprint=0123.4567"]
    code, text = resume(workshop, root, teacher.url, *weighed)
    refused(code, text, root)
    assert "names another, 0123.4567" in text


def change_json(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        change(tree)
        (folder / name).write_text(json.dumps(tree))

    return edit


EDITS = {
    "config.rope_parameters.rope_theta: 10000.0 in the checkpoint, 20000.0 now": change_json(
        "config.json", lambda config: config["rope_parameters"].update(rope_theta=20_000.0)
    ),
    "config.rms_norm_eps": change_json("config.json", lambda config: config.update(rms_norm_eps=1e-5)),
    "config.generation_eos_token_id": change_json(
        "generation_config.json", lambda config: config.update(eos_token_id=[1, 7])
    ),
    "tokenizer.merges_sha256": change_json("tokenizer.json", lambda tree: tree["model"]["merges"].pop()),
    "tokenizer.vocabulary_sha256": change_json(
        "tokenizer.json", lambda tree: tree["model"]["vocab"].update(a=tree["model"]["vocab"]["b"], b=66)
    ),
    "tokenizer.pre_tokenizer.add_prefix_space: False in the checkpoint, True now": change_json(
        "tokenizer.json", lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True)
    ),
    "tokenizer.chat_template_sha256": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
}


@pytest.mark.parametrize("difference", EDITS)
def test_another_config_or_tokenizer_at_the_students_path_is_refused(
    workshop: Workshop, teacher: TeacherProcess, root: Path, tmp_path: Path, difference: str
) -> None:
    folder = shutil.copytree(workshop.student, tmp_path / "student")
    EDITS[difference](folder)
    untold = "teacher.same_tokenizer=trust"  # else the teacher's own is compared first
    code, text = resume(workshop, root, teacher.url, f"student.checkpoint_path={folder}", untold)
    refused(code, text, root)
    assert difference in text


def test_the_same_student_at_another_path_goes_on_bit_for_bit(
    workshop: Workshop, teacher: TeacherProcess, root: Path, tmp_path: Path
) -> None:
    straight = tmp_path / "straight"
    given = workshop.settings(straight, *MORE, "run.id=run", url=teacher.url)
    assert train([*given, "run.steps=4"], tmp_path / "log") == 0
    assert train(given, tmp_path / "log") == 0
    folder = shutil.copytree(workshop.student, tmp_path / "moved")
    code, text = resume(workshop, root, teacher.url, f"student.checkpoint_path={folder}", f"student.tokenizer={folder}")
    assert code == 0, text
    assert trace_of(root / "run") == trace_of(straight / "run")
    assert final_files(root / "run", 8) == final_files(straight / "run", 8)


def test_a_checkpoint_of_an_older_trainer_loads_and_says_what_is_not_compared(
    workshop: Workshop, teacher: TeacherProcess, root: Path
) -> None:
    checkpoint = root / "run" / "checkpoints" / "step-00000004"
    state = json.loads((checkpoint / "state.json").read_text())
    del state["student"]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state, indent=1))
    from student_trainer.checkpoint.files import sha256

    path = checkpoint / "state.json"
    manifest["files"]["state.json"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    code, text = resume(workshop, root, teacher.url)
    assert code == 0 and "does not say which config and tokenizer" in text, text


def test_one_changed_line_of_the_data_is_refused_with_its_place(
    workshop: Workshop, teacher: TeacherProcess, tmp_path: Path
) -> None:
    """Far from what a sample would hit, and the cache of indexes is another machine's."""
    root, data = tmp_path / "root", tmp_path / "data.jsonl"
    lines = [line for path in workshop.sources.values() for line in path.read_text().splitlines()] * 34
    data.write_text("\n".join(lines[:10_000]))
    ours = f"data.sources.a.path={data}"
    assert train(workshop.settings(root, *MORE, "run.steps=4", ours, url=teacher.url), tmp_path / "log") == 0
    changed = json.loads(lines[6_543])["input_ids"]
    lines[6_543] = json.dumps({"input_ids": [*changed[:-1], changed[-1] ^ 1]})
    data.write_text("\n".join(lines[:10_000]))
    for more in (f"data.cache_folder={tmp_path}/elsewhere", "run.id=run"):
        code, text = resume(workshop, root, teacher.url, ours, more)
        refused(code, text, root)
        assert "source 'a' has changed since the run began" in text
        assert "at least one of documents 6,529 to 6,592 of 10,000 differs" in text, text

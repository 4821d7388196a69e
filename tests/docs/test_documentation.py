"""README.md, docs/ and examples/README.md are true: what they tell a reader to type is typed, page by page, in order.

One teacher serves all pages: the demo's, by `stillhouse-teacher` over HTTP. CONTRIBUTING.md has the marks by which a
page says what can't be executed here. `pytest tests/docs -k guides/mixtures` runs one page, `-rs` lists what was left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.markdown import EXECUTED, NEEDS, ROOT, Block, blocks_of, is_slow
from tests.docs.reader import Reader
from tests.teacher_process import TeacherProcess

# The API page has answers of the scripted teacher beside its requests, and a test of its own.
ELSEWHERE = {"docs/api.md": "tests/contract/test_service_docs.py"}
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("examples/*.md")))
    if str(path.relative_to(ROOT)) not in ELSEWHERE
]  # fmt: skip
BLOCKS = [block for path in PAGES for block in blocks_of(path)]
LEFT = [block for block in BLOCKS if block.language in EXECUTED and not block.executed]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#[^)]*)?\)")


def _parameter(path: Path) -> object:
    return pytest.param(path, id=str(path.relative_to(ROOT)), marks=[pytest.mark.slow] if is_slow(path) else [])


@pytest.fixture(scope="session")
def served(demo_teacher: Path) -> Iterator[TeacherProcess]:
    """The demo's teacher by the engine that is ready soonest."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with TeacherProcess(str(demo_teacher), "--engine", "hf", "--name", name) as process:
        yield process


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", [_parameter(path) for path in PAGES if any(b.executed for b in blocks_of(path))])
def test_a_page_does_what_it_says(path: Path, served: TeacherProcess, tmp_path: Path) -> None:
    with Reader(tmp_path, {"8000": served.port}) as reader:
        for block in blocks_of(path):
            if block.executed:
                reader.execute(block)


@pytest.mark.parametrize("block", LEFT, ids=[block.where for block in LEFT])
def test_a_block_that_is_left_says_why(block: Block) -> None:
    if "tested" in block.marks:
        assert (ROOT / block.marks["tested"]).is_file(), f"{block.where}: there is no {block.marks['tested']}"
        return
    needs = block.marks["needs"].split(", ")
    assert set(needs) <= set(NEEDS), f"{block.where}: needs {needs}, known are {NEEDS}"
    pytest.skip(f"{block.where} needs {', '.join(needs)}")


@pytest.mark.parametrize("path", [ROOT / page for page in ELSEWHERE] + PAGES, ids=lambda path: str(path.name))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = [target for target in LINK.findall(text) if target and not (path.parent / target).exists()]
    assert not broken, f"{path.relative_to(ROOT)} links to {broken}"


def test_fences_name_their_language() -> None:
    bare = [block.where for block in BLOCKS if not block.language and block.page != "README.md"]
    assert not bare, f"say sh, python, text, yaml, json, ...: {bare}"

"""README.md and docs/architecture.md against the tree that they describe."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_tree_is_as_the_packages_and_modules_say(page: str) -> None:
    spec = importlib.util.spec_from_file_location("readme_tree", ROOT / "docs" / "tree.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == module.with_tree(page, text), "run `make tree`"


def test_every_package_with_modules_is_in_the_tree() -> None:
    spec = importlib.util.spec_from_file_location("readme_tree", ROOT / "docs" / "tree.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    homes = {
        path.parent.relative_to(ROOT)
        for top in ("proto", "services", "trainer", "benchmarks", "demo")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert {str(home) for home in homes} == set(module.PACKAGES)


# Of others: what a package's sdist has, and what an export in SDAR's form writes.
NOT_OURS = {"setup.py", "configuration_sdar.py", "modeling_sdar.py"}
# One tells of the past, the other of files that are only shown.
APART = ("CHANGELOG.md", "extending.md")
FOLDERS = ("proto", "services", "trainer", "benchmarks", "demo", "deploy", "docs", "examples", "tests")


def test_files_that_are_named_are_there() -> None:
    """In modules and in the documentation: a name that stayed behind when its file moved leads nowhere."""
    pages = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    pages += ROOT.glob("*.md")
    known = {path.name for path in pages} | NOT_OURS
    gone = [
        (page, name)
        for page in pages
        if page.name not in APART
        for name in re.findall(r"`(?:[\w/.]*/)?(\w+\.py)`", page.read_text(encoding="utf-8"))
        if name not in known
    ]
    assert not gone, gone

"""The trainer's imports, those for types among them: no circle of files, and not too long a chain of them.

Which package may import which, import-linter holds (`layers` in pyproject.toml); it does not look inside a package.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

DEEPEST = 16  # files in the longest chain of imports
TRAINER = Path(__file__).parents[2] / "trainer" / "student_trainer"
PACKAGES = sorted(path.parent for path in TRAINER.glob("*/__init__.py"))


def imports() -> dict[str, set[str]]:
    graph = grimp.build_graph("student_trainer", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """From the file that nobody imports to the one that imports nobody. CycleError names a circle."""
    chains: dict[str, list[str]] = {}
    for module in TopologicalSorter(graph).static_order():
        below = max((chains[other] for other in graph[module]), key=len, default=[])
        chains[module] = [module, *below]
    return max(chains.values(), key=len)


def test_no_file_imports_itself_by_way_of_others_and_no_chain_is_long() -> None:
    chain = longest_chain(imports())
    assert chain[0] == "student_trainer.main"
    assert len(chain) <= DEEPEST, " -> ".join(chain)


def test_a_circle_is_found() -> None:
    with pytest.raises(CycleError):
        longest_chain({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_says_what_it_may_import_and_what_to_read_first(package: Path) -> None:
    about = " ".join((ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or "").split())
    assert "May import " in about, f"{package.name}/__init__.py does not say what it may import"
    found = re.search(r"Open `(\w+\.py)` first", about)
    assert found is not None, f"{package.name}/__init__.py does not say which file to open first"
    assert (package / found[1]).is_file(), f"{package.name}/__init__.py says to open {found[1]} first"

"""README.md against the tree that it describes."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tree_is_as_the_modules_say() -> None:
    spec = importlib.util.spec_from_file_location("readme_tree", ROOT / "docs" / "tree.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == module.with_tree(readme), "run `make tree`"

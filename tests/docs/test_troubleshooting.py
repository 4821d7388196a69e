"""Every message in docs/troubleshooting.md is one that the code prints."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.docs.markdown import ROOT

MESSAGES = re.findall(r"^> (.+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


@cache
def printed() -> list[str]:
    """Every text in the sources, with `…` for what is filled in."""
    texts = []
    for root in ("proto", "services", "trainer"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(re.sub(r"%[-+.\d]*[sdfgr]", "…", node.value))
    return texts


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_the_codes_own(message: str) -> None:
    """Its fixed parts come in one text of the code, in order."""
    parts = [part.strip() for part in re.split("…", message) if len(part.strip(" :;,.'\"()")) > 1]
    pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
    assert parts and any(pattern.search(text) for text in printed()), message


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 20

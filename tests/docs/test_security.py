"""docs/security.md: each line of the threat model names a test that is there."""

from __future__ import annotations

import re

from tests.docs.markdown import ROOT

PAGE = (ROOT / "docs/security.md").read_text()
MODEL = PAGE[PAGE.index("## Threat model") : PAGE.index("## What a run writes")]
NAMED = re.findall(r"`(\w+(?:/\w+)*\.py)::(\w+)`", MODEL)


def test_every_line_of_the_threat_model_names_tests_that_exist() -> None:
    rows = [
        line for line in MODEL.splitlines() if line.startswith("|") and not line.startswith(("|---", "| may not |"))
    ]
    assert len(rows) > 15 and len(NAMED) >= len(rows)
    for row in rows:
        assert "::test_" in row, row
    for path, name in NAMED:
        text = (ROOT / "tests" / path).read_text()
        assert re.search(rf"^(?:async )?def {name}\(", text, re.MULTILINE), f"{path} has no {name}"


def test_what_is_not_defended_is_said() -> None:
    assert "**Not defended.**" in MODEL and "operator lies" in MODEL

"""The site builds without a warning, and has a page for every guide."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.docs.markdown import ROOT


def test_the_site_builds_and_leads_to_every_page(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "site/index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (tmp_path / "site" / name / "index.html").is_file() or name.name == "index"
        assert name.name == "index" or f'href="{name}/"' in home, f"no way leads from the home page to {name}"
    reference = (tmp_path / "site/reference/index.html").read_text()
    assert "SyncTeacherClient" in reference and "TargetStore" in reference

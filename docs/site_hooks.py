"""What mkdocs asks while it builds the site: guides into the navigation, pages that live elsewhere, links out of docs/.

Named in mkdocs.yml. A page in docs/ is written for a code host, where `../README.md` is a link; the site has no such
page, and keeps the words.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that are written beside what they describe.
ELSEWHERE = {
    "wire.md": "proto/teacher_proto/WIRE.md",
    "changelog.md": "CHANGELOG.md",
    "security-policy.md": "SECURITY.md",
}
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Every guide, by its title; and every other page that mkdocs.yml names nowhere."""
    named = str(config.nav)
    pages = sorted((ROOT / "docs/guides").glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
    left = [path for path in pages if str(path.relative_to(ROOT / "docs")) not in named]
    for section in config.nav:
        if "Guides" in section:
            section["Guides"] = [{_title(path): str(path.relative_to(ROOT / "docs"))} for path in left]
    return config


def on_files(files: Files, config: Any) -> Files:
    for page, source in ELSEWHERE.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them: to a page of docs/, to the page of a file elsewhere, or the words alone."""
    name = page.file.src_uri
    source = ROOT / ELSEWHERE.get(name, f"docs/{name}")
    pages = {ROOT / file: page_name for page_name, file in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        path = (source.parent / target).resolve()
        if path in pages:
            inside = pages[path]
        elif path.is_relative_to(ROOT / "docs"):
            inside = str(path.relative_to(ROOT / "docs"))
        else:
            return words
        return f"[{words}]({os.path.relpath(inside, Path(name).parent)}{anchor or ''})"

    return _LINK.sub(link, markdown)


def _title(path: Path) -> str:
    heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1] if heading else path.stem

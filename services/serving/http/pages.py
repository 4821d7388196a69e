"""The pages for people: single files without a build step, which need no network but this service. For `app.py`."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi.responses import HTMLResponse

_FOLDER = Path(__file__).parent / "pages"


@cache
def _read(name: str) -> tuple[str, str]:
    """A page and the policy that lets its own script and style run and nothing else."""
    text = (_FOLDER / name).read_text(encoding="utf-8")
    sources = {
        tag: " ".join(f"'sha256-{_digest(body)}'" for body in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {sources['script']}; "
        f"style-src {sources['style']}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page(name: str) -> HTMLResponse:
    text, policy = _read(name)
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

#!/usr/bin/env python3
"""Searches the files in git for secrets, with detect-secrets and the patterns of `scan_image.py`. Run by `make check`.

    deploy/scan_secrets.py [FILE ...]

.secrets.baseline configures the detectors, and lists the made-up secrets in our tests. To add one after inspecting it:
`detect-secrets scan --baseline .secrets.baseline FILE`. Exit code 1 if there are others; outside a git checkout it
reports that nothing was scanned.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from detect_secrets import SecretsCollection
from detect_secrets.settings import transient_settings
from scan_image import PATTERNS

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    baseline = json.loads((ROOT / ".secrets.baseline").read_text())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if not arguments and listed.returncode != 0:
        print("secrets scan: not a git checkout, so nothing was scanned")
        return 0
    files = arguments or [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    known = {(name, one["type"], one["hashed_secret"]) for name, found in baseline["results"].items() for one in found}
    secrets = SecretsCollection(root=str(ROOT))
    with transient_settings({"plugins_used": baseline["plugins_used"], "filters_used": baseline["filters_used"]}):
        for name in files:
            secrets.scan_file(name)
    lines = [
        f"{name}:{one.line_number}: {one.type}"
        for name, one in secrets
        if (name, one.type, one.secret_hash) not in known
    ]
    for name in set(files) - baseline["results"].keys():
        content = (ROOT / name).read_bytes()
        lines += [f"{name}: {what}" for what, pattern in PATTERNS.items() if pattern.search(content)]
    print(
        "\n".join(lines) or f"secrets scan: {len(files)} files, no secrets other than the examples in .secrets.baseline"
    )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""Checks the installed packages against an advisory database on this disk, in a second and without a network.

    deploy/audit.py [DATABASE]

DATABASE is OSV's `all.zip` of the ecosystem PyPI, or a folder of advisories as JSON or YAML, such as PyPA's
advisory-database; by default .cache/advisories. If it does not exist, a message says so and the exit code is 0;
`make audit` queries PyPI instead. Exit code 1: an installed package has an advisory that a newer version fixes; 2: the
database is empty. Run by `make check`.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

DATABASE = Path(__file__).resolve().parent.parent / ".cache" / "advisories"


def main(arguments: list[str]) -> int:
    database = Path(arguments[0]) if arguments else DATABASE
    if not database.exists():
        print(f"dependency audit: no advisory database at {database}, so nothing was audited; "
              "`make audit` queries PyPI")  # fmt: skip
        return 0
    installed = {canonicalize_name(one.metadata["Name"]): one.version for one in metadata.distributions()}
    count, found = 0, []
    for advisory in advisories(database):
        count += 1
        found += [line for affected in advisory.get("affected", []) if (line := finding(advisory, affected, installed))]
    if not count:
        print(f"dependency audit: {database} contains no advisories", file=sys.stderr)
        return 2
    print("\n".join(sorted(set(found))) or f"dependency audit: {len(installed)} packages, {count} advisories, no match")
    return 1 if found else 0


def advisories(database: Path) -> Iterator[dict[str, Any]]:
    """All advisories that were not withdrawn."""
    for text, is_json in _texts(database):
        if is_json:
            advisory = json.loads(text)
        else:
            import yaml

            advisory = yaml.safe_load(text)
        if isinstance(advisory, dict) and not advisory.get("withdrawn"):
            yield advisory


def _texts(database: Path) -> Iterator[tuple[bytes, bool]]:
    if database.is_file():
        with zipfile.ZipFile(database) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    yield archive.read(name), True
        return
    for path in sorted(database.rglob("*")):
        if path.suffix == ".zip":
            yield from _texts(path)
        elif path.suffix in (".json", ".yaml", ".yml"):
            yield path.read_bytes(), path.suffix == ".json"


def finding(advisory: dict[str, Any], affected: dict[str, Any], installed: dict[str, str]) -> str | None:
    """One line, if an installed package is affected and a newer version is not."""
    package = affected.get("package", {})
    name = canonicalize_name(package.get("name", ""))
    if package.get("ecosystem") != "PyPI" or name not in installed:
        return None
    version = Version(installed[name])
    for ranges in affected.get("ranges", []):
        fixed = _fixed_in(version, ranges.get("events", [])) if ranges.get("type") == "ECOSYSTEM" else None
        if fixed is not None:
            return f"{name} {version}: {advisory.get('id')}, fixed in {fixed}: {advisory.get('summary', '')}".rstrip(
                ": "
            )
    return None


def _fixed_in(version: Version, events: list[dict[str, str]]) -> Version | None:
    """The version with the fix, if `version` is between the introduction of the fault and its fix."""
    introduced = False
    for event in events:
        try:
            if "introduced" in event:
                introduced = event["introduced"] == "0" or version >= Version(event["introduced"])
            elif "fixed" in event and introduced and version < (fixed := Version(event["fixed"])):
                return fixed
        except InvalidVersion:
            continue
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

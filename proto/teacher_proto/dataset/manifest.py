"""A dataset's manifest: its teacher, the query for each document, and the codec. Used by the rest of the package.

It never changes: what grows, shards with their counts and checksums, is in the index files. Its name is a digest of its
contents, so that writers of the same dataset write the same object, and a different one is detected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from teacher_proto.dataset.folder import Folder
from teacher_proto.errors import WireError
from teacher_proto.identity import digest, flatten
from teacher_proto.info import TeacherInfo, read_info
from teacher_proto.requests import KINDS, TargetSpec

FORMAT = "stillhouse dataset 1"
PREFIX, SUFFIX = "manifest-", ".json"
LOSSLESS: Mapping[str, Any] = {"name": "lossless"}


@dataclass(frozen=True)
class Manifest:
    """`codec` has the codec's name and parameters. `versions` are those of the first writer, and are not compared."""

    teacher: TeacherInfo
    spec: TargetSpec
    codec: Mapping[str, Any] = field(default_factory=lambda: dict(LOSSLESS))
    versions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def says(self) -> dict[str, Any]:
        """What distinguishes one dataset from another."""
        return {
            "format": FORMAT, "teacher": self.teacher.identity.model_dump(mode="json"),
            "query": json.loads(json.dumps(asdict(self.spec))), "codec": dict(self.codec),
        }  # fmt: skip

    @cached_property
    def digest(self) -> str:
        return digest(self.says)[:16]

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.digest}{SUFFIX}"

    def difference(self, other: Manifest) -> str:
        """The differences of two manifests, in one line."""
        ours, theirs = flatten(self.says), flatten(other.says)
        return "; ".join(
            f"{name}: {ours.get(name, 'absent')} vs {theirs.get(name, 'absent')}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        )

    def encode(self) -> bytes:
        tree = {
            "format": FORMAT, "teacher": self.teacher.model_dump(mode="json"),
            "tokenizer_sha256": self.teacher.identity.semantic.tokenizer_sha256, "query": asdict(self.spec),
            "codec": dict(self.codec), "versions": dict(self.versions),
        }  # fmt: skip
        return json.dumps(tree, indent=2).encode() + b"\n"


def find_manifest(folder: Folder) -> Manifest | None:
    """The manifest of the dataset at `folder`, or None. ValueError if it was changed, or if there are several."""
    names = sorted(name for name in folder.list("") if name.startswith(PREFIX) and name.endswith(SUFFIX))
    found = [_decode(folder.read(name), f"{folder.url}/{name}") for name in names]
    for name, manifest in zip(names, found, strict=True):
        if manifest.name != name:
            raise ValueError(f"{folder.url}/{name} has changed since it was written: its digest is {manifest.digest}")
    if len(found) > 1:
        raise ValueError(
            f"{folder.url} has {len(found)} manifests, {' and '.join(names)}: different datasets were put into "
            f"one folder ({found[0].difference(found[1])}). Keep each in its own folder: find the shards of one by "
            "`dataset` in their footers, and move them together with its manifest"
        )
    return found[0] if found else None


def no_dataset(folder: Folder) -> ValueError:
    return ValueError(f"there is no target dataset at {folder.url}: `stillhouse-teacher fill --output URL` creates one")


def _decode(data: bytes, place: str) -> Manifest:
    try:
        tree = json.loads(data)
        if tree["format"] != FORMAT:
            raise ValueError(f"got format {tree['format']!r}, expected {FORMAT!r}")
        query = tree["query"]
        if set(query) != {one.name for one in fields(TargetSpec)} or not set(query["kinds"]) <= set(KINDS):
            raise ValueError("its query is not valid")
        spec = TargetSpec(**{**query, "kinds": tuple(query["kinds"]), "temperatures": tuple(query["temperatures"])})
        return Manifest(read_info(TeacherInfo, tree["teacher"]), spec, dict(tree["codec"]), dict(tree["versions"]))
    except (ValueError, KeyError, TypeError, WireError) as error:
        raise ValueError(f"{place} is not a manifest of a target dataset: {type(error).__name__}: {error}") from None


def versions() -> dict[str, str]:
    """The versions of the packages that write shards."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("stillhouse", "pyarrow", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found

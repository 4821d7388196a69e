"""A teacher's identity: everything that determines its targets, hashed into a fingerprint that every response carries.

Services build a `TeacherIdentity` at start; client, checkpoints and the target store compare it. It has two halves. A
*semantic* change (other weights, another tokenizer) means other targets, and stops a run; a *numeric* change (another
engine version or device) only changes rounding, and is counted and logged as a warning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

Severity = Literal["same", "numeric", "semantic"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _WithOptions(_Frozen):
    """`options` is omitted when empty, so that the fingerprint of a teacher without options does not depend on it."""

    options: Mapping[str, str] = {}

    @model_serializer(mode="wrap")
    def _leave_out_none(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        if not fields["options"]:
            del fields["options"]
        return fields


class SemanticIdentity(_WithOptions):
    """What determines the meaning of targets. `weights` maps each weight file's name to its sha256; `options` are the
    engine options that change what it computes, with their values."""

    model: str
    revision: str
    config_sha256: str
    tokenizer_sha256: str
    weights: Mapping[str, str]
    dtype: str
    quantization: str | None
    vocab_size: int


class NumericIdentity(_WithOptions):
    """What determines the rounding of targets, including the engine `options` that choose kernels."""

    engine: str
    engine_version: str
    device: str
    parallel: str
    attention_backend: str


class TeacherIdentity(_Frozen):
    semantic: SemanticIdentity
    numeric: NumericIdentity

    @property
    def fingerprint(self) -> str:
        """`semantic.numeric`, 32 and 16 hexadecimal digits: the string alone shows which half has changed."""
        return f"{digest(self.semantic.model_dump())[:32]}.{digest(self.numeric.model_dump())[:16]}"

    def difference(self, other: TeacherIdentity) -> list[str]:
        """One line for each field that differs, such as `semantic.dtype: expected bfloat16, got float32`."""
        ours, theirs = flatten(self.model_dump()), flatten(other.model_dump())
        return [
            f"{name}: expected {ours.get(name, 'absent')}, got {theirs.get(name, 'absent')}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]


def compare_fingerprints(ours: str, theirs: str) -> Severity:
    """How two fingerprints differ; a malformed one counts as a semantic difference."""
    if ours == theirs:
        return "same"
    same_meaning = ours.split(".")[0] == theirs.split(".")[0] and "." in ours and "." in theirs
    return "numeric" if same_meaning else "semantic"


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a plain value: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_sha256(token_by_id: Mapping[int, str]) -> str:
    """sha256 of a tokenizer's vocabulary: its (id, token) pairs in the order of their ids."""
    return digest([[i, token_by_id[i]] for i in sorted(token_by_id)])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

"""An engine without a model, for tests: targets follow from the token ids, and it fails when its script says so.

`stillhouse-teacher scripted --engine scripted --script '{"delay_s": 0.1}'` serves it; tests also build it directly.
The reference for its targets is `scripted_model.scripted_logits`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from serving.engine import Job
from teacher_proto.compute.head import HeadScaling
from teacher_proto.errors import EngineDeadError, EngineError, EngineMemoryError
from teacher_proto.identity import NumericIdentity, SemanticIdentity, TeacherIdentity, digest
from teacher_proto.requests import KINDS, Kind, Limits, Query
from teacher_proto.targets import TokenTargets
from teacher_service.engines.protocol import checked
from teacher_service.engines.scripted_device import ScriptedDevice
from teacher_service.engines.scripted_model import reduce_sequence, scripted_head, scripted_hidden
from teacher_service.head_file import HeadFile, HeadTensor

Corruption = Literal[
    "nan", "infinite", "positive", "unsorted", "duplicate_id", "id_out_of_range", "wrong_k", "missing_row", "mass"
]
_IN_LOOP_ELEMENTS = 100_000


class Script(BaseModel):
    """How the scripted engine behaves. Times in seconds; a `..._token` acts on sequences that contain it.

    `tokens_per_second` makes jobs queue for one device, which computes a few tokens of one at a time, urgent jobs
    first; `delay_s` is a latency of every job, concurrently. `hang_token` hangs one job, `stuck_token` the engine.
    `oom_above_tokens` fails a job that raises the tokens being computed above it. `shift` rolls the rows, `noise` is
    the standard deviation of noise on the logits, `corrupt` damages finished records, `identity` overrides fields by
    dotted name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = 512
    max_sequence_length: int = 2048
    max_top_k: int = 256
    start_s: float = 0.0
    delay_s: float = 0.0
    tokens_per_second: float | None = None
    poison_token: int | None = None
    oom_token: int | None = None
    oom_above_tokens: int | None = None
    hang_token: int | None = None
    stuck_token: int | None = None
    die_token: int | None = None
    die_after_s: float | None = None
    shift: int = 0
    noise: float = 0.0
    corrupt: Corruption | None = None
    identity: dict[str, str] = {}


class ScriptedEngine:
    """`Engine` by arithmetic. `jobs_started`, `jobs_finished` and `jobs_aborted` count jobs, and `tokens_computed`
    every token that was computed, even for jobs that were aborted later."""

    kinds: tuple[Kind, ...] = KINDS

    def __init__(self, script: Script | None = None, model: str = "scripted"):
        self.script = script or Script()
        self.identity = _identity(model, self.script)
        self.limits = Limits(
            vocab_size=self.script.vocab_size,
            max_sequence_length=self.script.max_sequence_length,
            max_top_k=min(self.script.max_top_k, self.script.vocab_size),
        )
        self.jobs_started = self.jobs_finished = self.jobs_aborted = 0
        self.tokens_running = 0
        self.tokens_computed = 0
        self._death: str | None = None
        self._stuck = False
        rate = self.script.tokens_per_second
        self._device = None if rate is None else ScriptedDevice(rate)

    async def start(self) -> None:
        # In a thread, which can't be stopped, as real models load.
        await asyncio.to_thread(time.sleep, self.script.start_s)
        if self.script.die_after_s is not None:
            asyncio.get_running_loop().call_later(self.script.die_after_s, self.die)

    def die(self, reason: str = "the script said so") -> None:
        self._death = reason

    def hang(self) -> None:
        """Stop computing, but still look alive."""
        self._stuck = True
        if self._device is not None:
            self._device.stuck = True

    async def check(self) -> None:
        if self._death is not None:
            raise EngineDeadError(f"the scripted engine is dead: {self._death}")

    async def close(self) -> None:
        self._death = self._death or "it was closed"

    def head(self) -> HeadFile:
        weight_VD = scripted_head(self.script.vocab_size).astype("<f4")
        weight = HeadTensor("F32", weight_VD.shape, lambda start, stop: weight_VD[start:stop].tobytes())
        return HeadFile({"weight": weight}, HeadScaling())

    async def score(self, job: Job[Query]) -> TokenTargets:
        self.jobs_started += 1
        self.tokens_running += job.query.num_tokens
        try:
            await self._follow_script(job)
            targets = checked(await self._compute(job.query), job)
            await self.check()
        except asyncio.CancelledError:
            self.jobs_aborted += 1
            raise
        finally:
            self.tokens_running -= job.query.num_tokens
        self.jobs_finished += 1
        return targets

    async def _follow_script(self, job: Job[Query]) -> None:
        script = self.script
        if _holds(job.query, script.die_token):
            self.die(f"it got token {script.die_token}")
        await self.check()
        if _holds(job.query, script.poison_token):
            raise EngineError(f"the scripted engine fails on token {script.poison_token}")
        too_many = script.oom_above_tokens is not None and self.tokens_running > script.oom_above_tokens
        if too_many or _holds(job.query, script.oom_token):
            raise EngineMemoryError(f"out of memory with {self.tokens_running} tokens being computed")
        if _holds(job.query, script.stuck_token):
            self.hang()
        if self._stuck or _holds(job.query, script.hang_token):
            await asyncio.Event().wait()
        if script.delay_s:
            await asyncio.sleep(script.delay_s)
        if self._device is None:
            self.tokens_computed += job.query.num_tokens
        else:
            await self._device.compute(job.query.num_tokens, job.urgent, self._count)

    def _count(self, tokens: int) -> None:
        self.tokens_computed += tokens

    async def _compute(self, query: Query) -> TokenTargets:
        elements = (query.rows[1] - query.rows[0]) * self.script.vocab_size
        if elements <= _IN_LOOP_ELEMENTS:
            return self._targets(query)
        return await asyncio.to_thread(self._targets, query)

    def _targets(self, query: Query) -> TokenTargets:
        hidden_TD = np.roll(scripted_hidden(query.tokens_T), self.script.shift, axis=0)
        head_VD = scripted_head(self.script.vocab_size)
        targets = reduce_sequence(query, hidden_TD, head_VD, self.script.noise)
        return _CORRUPT[self.script.corrupt](targets) if self.script.corrupt else targets


def _holds(query: Query, token: int | None) -> bool:
    return token is not None and bool((query.tokens_T == token).any())


def _identity(model: str, script: Script) -> TeacherIdentity:
    tree = {
        "semantic": SemanticIdentity(
            model=model,
            revision="scripted-1",
            config_sha256=digest([script.vocab_size, script.max_sequence_length]),
            tokenizer_sha256=digest("scripted"),
            weights={"scripted": digest("scripted_model.py, first edition")},
            dtype="float32",
            quantization=None,
            vocab_size=script.vocab_size,
        ).model_dump(),
        "numeric": NumericIdentity(
            engine="scripted", engine_version="1", device="cpu", parallel="1", attention_backend="none"
        ).model_dump(),
    }
    for name, value in script.identity.items():
        group, _, field = name.partition(".")
        if group not in tree or field not in (*tree[group], "options"):
            known = [f"{group}.{field}" for group, fields in tree.items() for field in (*fields, "options")]
            raise ValueError(f"script.identity: unknown field {name!r}; available: {', '.join(known)}")
        tree[group][field] = json.loads(value) if field in ("weights", "vocab_size", "options") else value
    return TeacherIdentity.model_validate(tree)


def _spoil(name: str, row: int, value: float) -> Callable[[TokenTargets], TokenTargets]:
    def spoil(targets: TokenTargets) -> TokenTargets:
        tensors = targets.tensors()
        spoilt = tensors[name if name in tensors else "next_logprob"].copy()
        spoilt[row] = value
        changed: dict[str, Any] = {name if name in tensors else "next_logprob": spoilt}
        return replace(targets, **changed)

    return spoil


def _top_k(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]):  # type: ignore[no-untyped-def]
    def spoil(targets: TokenTargets) -> TokenTargets:
        if targets.ids is None or targets.logprobs is None:
            return targets
        ids_RK, logprobs_RK = change(targets.ids.copy(), targets.logprobs.copy())
        return replace(targets, ids=ids_RK, logprobs=logprobs_RK)

    return spoil


def _duplicate(ids_RK: np.ndarray, logprobs_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids_RK[:, -1] = ids_RK[:, 0]
    return ids_RK, logprobs_RK


def _beyond(ids_RK: np.ndarray, logprobs_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids_RK[:, -1] = np.iinfo(np.uint16).max
    return ids_RK, logprobs_RK


_CORRUPT: dict[Corruption, Callable[[TokenTargets], TokenTargets]] = {
    "nan": _spoil("lse", 0, np.nan),
    "infinite": _spoil("lse", 0, np.inf),
    "positive": _top_k(lambda ids, logprobs: (ids, np.abs(logprobs) + np.float16(1))),
    "unsorted": _top_k(lambda ids, logprobs: (ids[:, ::-1], logprobs[:, ::-1])),
    "duplicate_id": _top_k(_duplicate),
    "id_out_of_range": _top_k(_beyond),
    "wrong_k": _top_k(lambda ids, logprobs: (ids[:, 1:], logprobs[:, 1:])),
    "missing_row": lambda targets: targets.narrow(targets.start, targets.start + targets.num_rows - 1),
    "mass": _top_k(lambda ids, logprobs: (ids, np.zeros_like(logprobs))),
}

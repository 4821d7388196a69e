"""Records to measure target datasets with: synthetic ones, and a real model's on real text. Used by `dataset.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from teacher_proto.dataset.codecs import parse_codec
from teacher_proto.dataset.manifest import Manifest
from teacher_proto.identity import NumericIdentity, SemanticIdentity, TeacherIdentity
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import Limits, Query, TargetSpec
from teacher_proto.targets import TokenTargets

ROOT = Path(__file__).resolve().parent.parent
TEACHER, TEXT = ROOT / ".cache" / "demo" / "teacher", ROOT / ".cache" / "demo" / "text" / "prose.jsonl"
LENGTH, TEMPERATURE = 512, 2.0


def manifest(vocab_size: int, top_k: int, codec: str) -> Manifest:
    semantic = SemanticIdentity(
        model="benchmark", revision="1", config_sha256="c", tokenizer_sha256="t", weights={}, dtype="float32",
        quantization=None, vocab_size=vocab_size, options={},
    )  # fmt: skip
    numeric = NumericIdentity(
        engine="none", engine_version="1", device="cpu", parallel="1", attention_backend="none", options={}
    )
    identity = TeacherIdentity(semantic=semantic, numeric=numeric)
    limits = Limits(vocab_size=vocab_size, max_sequence_length=LENGTH)
    info = TeacherInfo(identity=identity, fingerprint=identity.fingerprint, limits=limits, kinds=("top_k",))
    return Manifest(info, TargetSpec(("top_k",), top_k, (TEMPERATURE,)), parse_codec(codec))


def synthetic(tokens: int, vocab_size: int, top_k: int) -> Iterator[tuple[np.ndarray, TokenTargets]]:
    """Documents with valid records: ids drawn by Zipf's law; the next token is the teacher's first choice."""
    rng = np.random.default_rng(0)
    shares_V = 1 / np.arange(1, vocab_size + 1)
    edges_V = np.cumsum(shares_V / shares_V.sum())
    name_V = rng.permutation(vocab_size)
    for _ in range(max(tokens // LENGTH, 1)):
        drawn = np.minimum(np.searchsorted(edges_V, rng.random((LENGTH, 12 * top_k))), vocab_size - 1)
        keys = np.sort(drawn.astype(np.int64) << 32 | rng.integers(0, 2**31, drawn.shape), axis=1)
        first = np.ones(keys.shape, dtype=bool)
        first[:, 1:] = (keys[:, 1:] >> 32) != (keys[:, :-1] >> 32)
        order = np.argsort(np.where(first, keys & 0xFFFFFFFF, 2**40), axis=1)[:, :top_k]
        ids_RK = name_V[np.take_along_axis(keys >> 32, order, axis=1)]
        weights_RK = -np.sort(-rng.gamma(0.3, size=(LENGTH, top_k)), axis=1) + 1e-4
        tail_R = rng.uniform(0.01, 0.4, LENGTH)
        logprobs_RK = np.log(weights_RK / weights_RK.sum(axis=1, keepdims=True) * (1 - tail_R)[:, None])
        next_R = logprobs_RK[:, 0].astype(np.float16).astype(np.float32)
        next_R[-1] = np.nan
        softened_R = np.exp(logprobs_RK / TEMPERATURE).sum(axis=1) + tail_R
        yield np.append(rng.integers(0, vocab_size), ids_RK[:-1, 0]), TokenTargets(
            start=0, ids=ids_RK.astype(np.uint16 if vocab_size <= 65_536 else np.int32),
            logprobs=logprobs_RK.astype(np.float16), lse=rng.normal(20, 3, LENGTH).astype(np.float32),
            next_logprob=next_R, log_z=np.log(softened_R)[:, None].astype(np.float32),
        )  # fmt: skip


def renamed(
    records: Sequence[tuple[np.ndarray, TokenTargets]], vocab_size: int, number: int
) -> list[tuple[np.ndarray, TokenTargets]]:
    """Copy `number` of the records, with permuted ids and so with different documents. Drawing new ones would take
    longer than what is measured with them.
    """
    name_V = np.random.default_rng(number).permutation(vocab_size)
    return [
        (name_V[tokens_T], replace(targets, ids=name_V[targets.ids].astype(targets.ids.dtype)))
        for tokens_T, targets in records
        if targets.ids is not None
    ]


def of_a_model(tokens: int, top_k: int) -> tuple[int, list[tuple[np.ndarray, TokenTargets]]]:
    """The demo's teacher on the demo's prose: the vocabulary size, and documents with their records."""
    from serving.engine import Job
    from teacher_service.run import ENGINES
    from teacher_service.settings import parse_settings
    from teacher_service.text import Text

    async def answers() -> tuple[int, list[tuple[np.ndarray, TokenTargets]]]:
        engine = ENGINES["hf"](parse_settings([str(TEACHER), "--engine", "hf"]))
        await engine.start()
        try:
            text = Text(TEACHER, engine.limits.vocab_size)
            lines = [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]
            found, total = [], 0
            for line in lines:
                tokens_T = np.array(text.encode([line], True)[0][:LENGTH])
                query = Query(tokens_T, (0, len(tokens_T)), TargetSpec(("top_k",), top_k, (TEMPERATURE,)))
                found.append((tokens_T, await engine.score(Job(query, "benchmark"))))
                total += len(tokens_T)
                if total >= tokens:
                    break
            return engine.limits.vocab_size, found
        finally:
            await engine.close()

    return asyncio.run(answers())

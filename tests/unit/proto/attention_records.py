"""Attention answers that a healthy service could give: random states, exact relations. For the contract's tests."""

from __future__ import annotations

import numpy as np
import torch

from teacher_proto.attention import AttentionInfo, AttentionLimits, AttentionRequest, AttentionShape
from teacher_proto.attention_targets import PARTS, AttentionTargets
from teacher_proto.compute.relations import relations
from teacher_proto.identity import TeacherIdentity
from teacher_proto.wire.attention import AttentionHeader, encode_attention, encode_attention_header
from teacher_proto.wire.responses import encode_end
from tests.unit.proto.fake_teacher import VOCAB, identity

SHAPE = AttentionShape(num_layers=7, max_layer=5, query_heads=4, kv_heads=2, head_width=8)
LIMITS = AttentionLimits(vocab_size=VOCAB, max_sequence_length=64)


def make_info(who: TeacherIdentity | None = None) -> AttentionInfo:
    who = who or identity()
    return AttentionInfo(identity=who, fingerprint=who.fingerprint, limits=LIMITS, shape=SHAPE)


def make_states(tokens_T: np.ndarray) -> dict[str, np.ndarray]:
    """float32 [T, H, dh] of each part, from the tokens alone."""
    random = np.random.default_rng(tokens_T.tolist())
    heads = {"query": SHAPE.query_heads, "key": SHAPE.kv_heads, "value": SHAPE.kv_heads}
    return {
        part: random.normal(size=(len(tokens_T), heads[part], SHAPE.head_width)).astype(np.float32) for part in PARTS
    }


def make_record(request: AttentionRequest, index: int) -> AttentionTargets:
    spec, tokens_T = request.spec(SHAPE.num_layers), request.sequences[index]
    states = make_states(tokens_T)
    rows_r = None if request.rows is None else request.rows[index].astype("<i4")
    if spec.kind == "states":
        tensors = {}
        for part, states_THd in states.items():
            if spec.dtype == "float16":
                tensors[part] = states_THd.astype(np.float16)
                continue
            scale_TH1 = np.abs(states_THd).max(axis=-1, keepdims=True) / 127
            tensors |= {part: np.round(states_THd / scale_TH1).astype(np.int8), f"{part}_scale": scale_TH1}
        return AttentionTargets("states", spec.layer, **tensors)
    positions_r = np.arange(len(tokens_T)) if rows_r is None else rows_r
    if spec.kind == "relations":
        assert spec.form is not None
        tables = {
            part: relations(
                torch.tensor(x), form=spec.form, relation_heads=spec.relation_heads, rows_r=torch.tensor(positions_r)
            )
            .numpy()
            .astype(np.float16)
            for part, x in states.items()
        }
        return AttentionTargets("relations", spec.layer, rows_r, **tables)
    logits_HTT = np.einsum("thd,shd->hts", states["query"], states["key"].repeat(2, axis=1))
    weights_HTT = np.exp(logits_HTT - logits_HTT.max()) * np.tri(len(tokens_T))
    maps_HTT = (weights_HTT / weights_HTT.sum(axis=-1, keepdims=True)).astype(np.float16)
    return AttentionTargets("maps", spec.layer, rows_r, maps=maps_HTT[:, positions_r])


def make_body(request: AttentionRequest, *, request_id: str = "7f3a", fingerprint: str = "5e1f.c0de") -> bytes:
    spec = request.spec(SHAPE.num_layers)
    count = len(request.sequences)
    header = AttentionHeader(request_id, fingerprint, count, SHAPE.num_layers, spec.layer, spec.kind)
    records = [encode_attention(i, make_record(request, i)) for i in reversed(range(count))]
    return b"".join([encode_attention_header(header), *records, encode_end(count)])

"""Real vLLM with an option that changes its answers: other answers, another fingerprint, and the difference named."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest

from serving.engine import Job
from teacher_proto.identity import compare_fingerprints
from teacher_proto.requests import Query, TargetSpec
from teacher_service.engines.vllm_engine import VllmEngine
from tests.teacher_process import TeacherProcess

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_another_rope_is_another_teacher(vllm_engine: VllmEngine, tiny_llama: Path) -> None:
    tokens_T = np.arange(40) * 7 % 512
    plain = await vllm_engine.score(Job(Query(tokens_T, (0, 40), TargetSpec(("score",))), "plain"))
    rope = '{"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}'
    with TeacherProcess(str(tiny_llama), "--engine", "vllm", "--hf-overrides", rope) as teacher:
        body = {"sequences": [tokens_T.tolist()], "kinds": ["score"], "top_k": 0}
        async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
            answer = (await client.post("/v1/targets", json=body)).json()
            identity = (await client.get("/v1/teacher")).json()["identity"]
    other = np.array(answer["sequences"][0]["next_logprob"][:-1])
    assert plain.next_logprob is not None and np.abs(other - plain.next_logprob[:-1]).max() > 1e-3
    assert compare_fingerprints(vllm_engine.identity.fingerprint, teacher.fingerprint) == "semantic"
    assert list(identity["semantic"]["options"]) == ["hf_overrides"] and "options" not in identity["numeric"]

"""Real vLLM whose engine process is killed at work: nobody hangs, everybody is told, nothing is left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from teacher_proto.errors import EngineDeadError
from teacher_proto.requests import TargetSpec
from teacher_service.engines.vllm_engine import VllmEngine
from tests.contract.engine_cases import job, sequences_of

SPEC = TargetSpec(kinds=("top_k",), top_k=64, temperatures=(2.0, 5.0))


@pytest.mark.vllm
async def test_killed_engine_process_ends_every_job_and_leaves_no_child(tiny_llama: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    engine = VllmEngine(str(tiny_llama), max_num_batched_tokens=64, max_num_seqs=4, kv_cache_bytes=2**22)
    await engine.start()
    # Python's resource tracker belongs to this process, not to the engine, and lives as long as it does.
    started = [child for child in psutil.Process().children(recursive=True) if child not in before]
    children = [child for child in started if "resource_tracker" not in " ".join(child.cmdline())]
    (core,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    jobs = [asyncio.create_task(engine.score(job(t, SPEC))) for t in sequences_of([512] * 40, 512)]
    done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
    core.kill()
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*jobs, return_exceptions=True)
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    assert failures and len(failures) >= len(jobs) - 8 * len(done)
    assert all(isinstance(failure, EngineDeadError) for failure in failures)
    with pytest.raises(EngineDeadError, match="engine process has ended"):
        await engine.check()
    with pytest.raises(EngineDeadError):
        await engine.score(job(*sequences_of([5], 512), SPEC))
    await engine.close()
    await engine.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive

"""Fixtures that any test may use: tiny models on disk, engines over them, what small runs of the trainer need.

Engines live for the whole session and in its event loop: tests that use one are marked
`@pytest.mark.asyncio(loop_scope="session")`.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from tests.workers import longest_first, worker_count

if TYPE_CHECKING:
    from teacher_service.engines.hf import HfEngine
    from teacher_service.engines.vllm_engine import VllmEngine
    from tests.teacher_process import TeacherProcess
    from tests.trainer_run import Workshop

# torch's inductor finds code that it wrote for one set of instructions again when it is held to another, builds it for
# that, and the kernel leaves half of its elements out: each set has a cache of its own.
_CACHE = f"inductor-{getpass.getuser()}-{os.environ.get('ATEN_CPU_CAPABILITY', 'all')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "stillhouse-tests" / _CACHE))

# A busy machine is slow at drawing examples, which says nothing about the code.
settings.register_profile("stillhouse", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stillhouse")


def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: see `workers`."""
    return worker_count()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        longest_first(items, Path(__file__).parent)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random float32 Llama with tokenizer: V=512, 2 layers, H=64, head_dim 32, 512 positions."""
    from tests.models import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def hf_engine(tiny_llama: Path) -> AsyncIterator[HfEngine]:
    """The transformers engine over `tiny_llama`, in float32."""
    from teacher_service.engines.hf import HfEngine

    engine = HfEngine(str(tiny_llama), dtype="float32", max_batch_tokens=600)
    await engine.start()
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_engine(tiny_llama: Path) -> AsyncIterator[VllmEngine]:
    """Real vLLM over `tiny_llama`, in float32, 10 to 20 seconds to start.

    Steps of 64 tokens, so that most prompts are prefilled in chunks, and a cache of three of the longest sequences
    for eight at a time, so that some are preempted.
    """
    from teacher_service.engines.vllm_engine import VllmEngine

    tokens, bytes_per_token = 3 * 512, 2 * 2 * 32 * 4
    engine = VllmEngine(
        str(tiny_llama), max_num_batched_tokens=64, max_num_seqs=8, kv_cache_bytes=tokens * bytes_per_token
    )
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture(scope="session")
def demo_teacher() -> Path:
    """Folder of the demo's teacher, SmolLM2-135M-Instruct in bfloat16; skips where `make demo` never prepared it."""
    folder = Path(__file__).parents[1] / ".cache" / "demo" / "teacher"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the demo's teacher is not prepared: python -m demo.prepare")
    return folder


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny student and text that the scripted teacher would write."""
    from tests.trainer_run import Workshop

    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def teacher() -> Iterator[TeacherProcess]:
    """The real service with the scripted engine, which has the tiny student's tokenizer and fails at nothing."""
    from tests.teacher_process import TeacherProcess
    from tests.trainer_run import teacher_script

    with TeacherProcess(script=teacher_script()) as process:
        yield process

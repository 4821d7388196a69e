"""vLLM without a response: prefill alone, or prefill with the head's matmul at all positions. Started by `serve.py`.

    python -m benchmarks.bare_prefill MODEL      each line of stdin is a round: {"head": bool, "sequences": [...]}

The engine is configured like the teacher service's, except for the pooler. For each round it prints the seconds that it
took. With the head, this is the physical limit for any server of logits. vLLM loads its model class from this module.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

READY = "ready"


def __getattr__(name: str) -> type:
    if "." not in name:
        raise AttributeError(name)
    from teacher_proto.compute.reduction import HEAD_ROWS, HEAD_ROWS_ACCELERATOR
    from teacher_service.engines.vllm_adapter import TargetsPooler, adapted

    class BarePooler(TargetsPooler):
        """Computes nothing, or the logits of every position, chunked like the service's, and drops them."""

        def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor | None]:
            head_rows = HEAD_ROWS.get(hidden_states.device.type, HEAD_ROWS_ACCELERATOR)
            if any((params.extra_kwargs or {}).get("head") for params in pooling_metadata.pooling_params):
                for start in range(0, len(hidden_states), head_rows):
                    self.compute_logits(hidden_states[start : start + head_rows])
            finished = pooling_metadata.get_pooling_cursor().get_finished_mask()
            return [hidden_states[:1, :1].clone() if done else None for done in finished]

    return adapted(name, BarePooler)


async def serve(model: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from teacher_proto.model_files import find_model
    from teacher_service.engines.vllm_options import adapted_class, engine_arguments

    folder = find_model(model)
    adapted = adapted_class(folder, __spec__.name if __spec__ else __name__)
    arguments = engine_arguments(folder, {}, {}, "auto") | {"model_class_overrides": adapted}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    print(READY, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        task = json.loads(line)
        began = time.perf_counter()
        await asyncio.gather(*(_prefill(llm, ids, task["head"], i) for i, ids in enumerate(task["sequences"])))
        print(time.perf_counter() - began, flush=True)
    llm.shutdown()


async def _prefill(llm: Any, ids: list[int], head: bool, number: int) -> None:
    from vllm import PoolingParams
    from vllm.inputs import tokens_input

    from teacher_service.engines.vllm_adapter import TASK

    params = PoolingParams(task=TASK, extra_kwargs={"head": head})
    async for _ in llm.encode(tokens_input(ids), params, f"{number}-{time.monotonic_ns()}"):
        pass


def main() -> None:
    from teacher_service.engines.vllm_options import prepare_environment

    prepare_environment()
    asyncio.run(serve(str(Path(sys.argv[1]).resolve())))


if __name__ == "__main__":
    main()

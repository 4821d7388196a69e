"""The process that holds vLLM: one engine, stepped in its main thread. Started by `vllm_link.EngineProcess`.

vLLM is imported only in this process: the service stays light, and nothing is loaded twice. With several GPUs, vLLM
starts a worker process for each from here. Messages are those of `vllm_messages.py`.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from pydantic import ValidationError

from serving.main import QuietEnd
from teacher_proto.model_files import ModelFolder
from teacher_proto.process.parent import end_spawned_with_parent
from teacher_service.engines.vllm_identity import deciding_options, length_option
from teacher_service.engines.vllm_messages import receive, send
from teacher_service.engines.vllm_options import engine_arguments, in_one_process, prepare_environment
from teacher_service.engines.vllm_wrappers import missing

EXIT_REFUSED, EXIT_DIED = 2, 70


@dataclass(frozen=True)
class Order:
    """What to load, and how: the options of `VllmEngine`."""

    folder: ModelFolder
    options: dict[str, Any]
    vllm_args: dict[str, Any]
    head_dtype: str


def run(connection: Connection, order: Order) -> None:
    """Load, report what was loaded, and answer jobs until `close`, or until the service is gone."""
    end_spawned_with_parent()
    # Ctrl-C in a terminal goes to its whole process group; the service alone decides when the engine ends.
    os.setpgrp()
    # A handler, not SIG_IGN, which vLLM's own workers would inherit.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    os.dup2(2, 1)  # the service's stdout has its ready line and nothing else
    logging.basicConfig(level=logging.ERROR)
    warnings.simplefilter("ignore")
    end = QuietEnd(EXIT_DIED)
    end.code = _serve(connection, order)


def _serve(connection: Connection, order: Order) -> int:
    try:
        engine = _load(connection, order)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        send(connection, "refused", _reason(error, order.folder))
        return EXIT_REFUSED
    send(connection, "ready", _facts(engine, order))
    inbox: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_fill, args=(connection, inbox), name="inbox", daemon=True).start()
    _answer(engine, connection, inbox)
    if not in_one_process(order.options | order.vllm_args):
        engine.engine_core.shutdown()  # otherwise ending this process is enough, and takes no second
    return 0


def _load(connection: Connection, order: Order) -> Any:
    """A vLLM LLMEngine."""
    began = time.monotonic()

    def stage(what: str) -> None:
        nonlocal began
        now = time.monotonic()
        send(connection, "stage", what, now - began)
        began = now

    prepare_environment()
    from tqdm import tqdm

    # By default tqdm makes a multiprocessing lock, about which Python warns if this process is killed.
    tqdm.set_lock(threading.RLock())
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from teacher_service.engines import vllm_adapter

    stage("vLLM imported")
    vllm_adapter.on_weights = lambda: stage("weights loaded")
    arguments = AsyncEngineArgs(**engine_arguments(order.folder, order.options, order.vllm_args, order.head_dtype))
    engine = LLMEngine.from_engine_args(arguments)
    stage("engine up, memory measured")
    return engine


def _facts(engine: Any, order: Order) -> dict[str, Any]:
    """What the service publishes about the engine, and what it compares the checkpoint's head with."""
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    model, parallel = engine.model_config, engine.vllm_config.parallel_config
    # The last rank of a pipeline is the one that has the head.
    (*_, described) = engine.collective_rpc("stillhouse_describe")
    defaults = {field.name: field.default for field in fields(AsyncEngineArgs)}
    semantic, numeric = deciding_options(order.vllm_args, defaults)
    return described | {
        "version": vllm.__version__,
        "device": current_platform.get_device_name(),
        "parallel": f"tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "head_dtype": str(model.head_dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "vocab_size": model.get_vocab_size(),
        "hidden_size": model.get_hidden_size(),
        "max_model_len": model.max_model_len,
        "semantic_options": semantic | length_option(model.hf_text_config.to_dict(), model.max_model_len),
        "numeric_options": numeric,
    }


def _fill(connection: Connection, inbox: queue.SimpleQueue[list[Any] | None]) -> None:
    """Receive messages in a thread, so that the service never waits for a step to end."""
    try:
        while True:
            inbox.put(receive(connection))
    except (EOFError, OSError):
        inbox.put(None)


def _answer(engine: Any, connection: Connection, inbox: queue.SimpleQueue[list[Any] | None]) -> None:
    """Step the engine while it has jobs, until `close` arrives or the service is gone."""
    jobs: dict[int, EngineJob] = {}
    while True:
        for message in _take(inbox, wait=not engine.has_unfinished_requests()):
            if message is None or message[0] == "close":
                return
            if message[0] == "abort":
                job = jobs.pop(message[1], None)
                if job is not None:
                    engine.abort_request([job.request_id])
            else:
                _add(engine, connection, jobs, EngineJob(*message[1:]))
        if not engine.has_unfinished_requests():
            continue
        for output in engine.step():
            job = jobs.pop(int(output.request_id.partition("-")[0]), None)
            if job is not None:
                _hand_over(engine, connection, jobs, job, output)


@dataclass(frozen=True)
class EngineJob:
    """A job as the service sends it; `computed` counts the tokens that vLLM has computed for it so far."""

    number: int
    tokens: bytes
    asked: dict[str, Any]
    priority: int
    reads_cache: bool
    computed: int = 0

    @property
    def request_id(self) -> str:
        """vLLM's id for the job; a retry has another one."""
        return f"{self.number}-{self.computed}"

    @property
    def num_rows(self) -> int:
        start, stop = self.asked["rows"]
        return int(stop - start)


def _hand_over(engine: Any, connection: Connection, jobs: dict[int, EngineJob], job: EngineJob, output: Any) -> None:
    """Send the result of a job to the service; or retry without the prefix cache, if that held some of its rows.

    vLLM takes as much from its cache as it finds there, and has no hidden states for that.
    """
    if output.error is not None:
        send(connection, "failed", job.number, str(output.error))
        return
    rows_RB = output.outputs.data.numpy()
    computed = job.computed + len(job.tokens) // 4 - (output.num_cached_tokens or 0)
    if job.reads_cache and len(rows_RB) < job.num_rows:
        _add(engine, connection, jobs, replace(job, reads_cache=False, computed=computed))
        return
    send(connection, "answer", job.number, computed, *rows_RB.shape)
    connection.send_bytes(np.ascontiguousarray(rows_RB).data.cast("B") if rows_RB.size else b"")


def _take(inbox: queue.SimpleQueue[list[Any] | None], wait: bool) -> Iterator[list[Any] | None]:
    """All messages that have arrived; with `wait`, at least one."""
    if wait:
        yield inbox.get()
    while not inbox.empty():
        yield inbox.get()


def _add(engine: Any, connection: Connection, jobs: dict[int, EngineJob], job: EngineJob) -> None:
    from vllm import PoolingParams
    from vllm.inputs import tokens_input

    from teacher_service.engines.vllm_adapter import TASK

    prompt = tokens_input(np.frombuffer(job.tokens, dtype="<i4").tolist())
    params = PoolingParams(task=TASK, extra_kwargs=job.asked, skip_reading_prefix_cache=not job.reads_cache)
    try:
        engine.add_request(job.request_id, prompt, params, priority=job.priority)
    except ValueError as error:
        send(connection, "failed", job.number, str(error))
    else:
        jobs[job.number] = job


def _reason(error: Exception, folder: ModelFolder) -> str:
    """The text of an error, without pydantic's frame around it."""
    if isinstance(error, ImportError) and (told := missing(folder, error)):
        return told
    if isinstance(error, ValidationError):
        return "; ".join(one["msg"] for one in error.errors(include_url=False))
    return str(error)

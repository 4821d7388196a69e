"""Checks the services over HTTP, on the device, against transformers in float64 on the CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from deploy.gpu_checks.models import TINY, save_qwen3
from deploy.gpu_checks.report import Options, Report
from teacher_proto.attention import AttentionRequest
from teacher_proto.client.sync_client import SyncAttentionClient, SyncTeacherClient
from teacher_proto.requests import TargetsRequest

READY = re.compile(rb"ready at (\S+), ")
TEMPERATURES = (2.0, 5.0)
# On errors of logprobs, in nats. float16 rounds a logprob of -10 by up to 0.004.
BOUNDS = {"float32": 1e-2, "bfloat16": 0.25}


def teacher(report: Report, options: Options) -> None:
    _teacher(report, options, "hf", "float32")
    if not options.tiny:
        _teacher(report, options, "hf", "bfloat16")


def vllm(report: Report, options: Options) -> None:
    if importlib.util.find_spec("vllm") is None:
        report.note("left out: vLLM is not installed")
    elif options.tiny:
        report.note("left out: on a CPU the test suite covers vLLM")
    else:
        _teacher(report, options, "vllm", "bfloat16")


def _teacher(report: Report, options: Options, engine: str, dtype: str) -> None:
    # vLLM's kernels need a head size of 64 or more.
    shape = TINY | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
    model = save_qwen3(options.folder / f"{engine}-{dtype}", shape)
    sequences = _sequences(6, 12 if options.tiny else 300)
    arguments = [str(model), "--engine", engine, "--dtype", dtype]
    with _service("teacher_service.main", arguments, options) as url, SyncTeacherClient(url) as client:
        request = TargetsRequest(sequences=sequences, kinds=("top_k", "score"), top_k=32, temperatures=TEMPERATURES)
        answers = client.targets(request)
        again = client.targets(request)
    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager").eval()
    errors = dict.fromkeys(("logprobs of the top 32", "the next token's logprob", "log_z"), 0.0)
    for tokens_T, answer in zip(sequences, answers, strict=True):
        with torch.no_grad():
            z_TV = truth(torch.tensor(tokens_T)[None]).logits[0]
        log_p_TV = z_TV.log_softmax(-1)
        ids_TK = torch.from_numpy(answer.ids.astype(np.int64))
        lse_T = z_TV.logsumexp(-1)
        next_T = log_p_TV[:-1].gather(1, torch.tensor(tokens_T[1:])[:, None])[:, 0]
        log_z_TZ = torch.stack([(z_TV / t).logsumexp(-1) - lse_T / t for t in TEMPERATURES], 1)
        found = (
            (answer.logprobs, log_p_TV.gather(1, ids_TK)), (answer.next_logprob[:-1], next_T), (answer.log_z, log_z_TZ)
        )  # fmt: skip
        for name, (ours, true) in zip(errors, found, strict=True):
            errors[name] = float(np.maximum(errors[name], np.abs(np.asarray(ours, np.float64) - true.numpy()).max()))
    for name, error in errors.items():
        report.close(f"{engine} in {dtype}: {name}", error, BOUNDS[dtype])
    same = all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(answers, again, strict=True))
    report.check(f"{engine} in {dtype}: same response to the same query", same)


def attention(report: Report, options: Options) -> None:
    model = save_qwen3(options.folder / "model", TINY)
    sequences = _sequences(4, 12 if options.tiny else 200)
    arguments = [str(model), "--dtype", "float32"]
    with _service("attention_service.main", arguments, options) as url, SyncAttentionClient(url) as client:
        maps = client.attention(AttentionRequest(sequences=sequences, kind="maps", layer=1))
        states = client.attention(AttentionRequest(sequences=sequences, kind="states", layer=1))
    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager").eval()
    errors = dict.fromkeys(("maps", "maps computed from the states"), 0.0)
    for tokens_T, map_of, state in zip(sequences, maps, states, strict=True):
        with torch.no_grad():
            true_HTT = truth(torch.tensor(tokens_T)[None], output_attentions=True).attentions[1][0].numpy()
        for name, ours_HTT in zip(errors, (map_of.maps.astype(np.float64), _map_of(state)), strict=True):
            errors[name] = float(np.maximum(errors[name], np.abs(ours_HTT - true_HTT).max()))
    for name, error in errors.items():
        report.close(f"{name} of a layer, against transformers' eager attention", error, 5e-3)


def _map_of(state: Any) -> np.ndarray:
    """The attention probabilities of queries [T, H, d] and keys [T, H_kv, d], [H, T, T]."""
    query_HTd, key_HTd = (np.moveaxis(x.astype(np.float64), 1, 0) for x in (state.query, state.key))
    key_HTd = np.repeat(key_HTd, len(query_HTd) // len(key_HTd), 0)
    score_HTT = query_HTd @ np.swapaxes(key_HTd, 1, 2) / query_HTd.shape[-1] ** 0.5
    score_HTT[:, np.triu(np.ones(score_HTT.shape[1:], bool), 1)] = -np.inf
    weight_HTT = np.exp(score_HTT - score_HTT.max(-1, keepdims=True))
    return weight_HTT / weight_HTT.sum(-1, keepdims=True)


def _sequences(count: int, longest: int) -> tuple[list[int], ...]:
    draw = np.random.default_rng(0)
    return tuple(draw.integers(2, 300, int(draw.integers(longest // 2, longest + 1))).tolist() for _ in range(count))


@contextmanager
def _service(module: str, arguments: list[str], options: Options) -> Iterator[str]:
    """The URL of a service started in this section's process group. RuntimeError with its log if it does not start."""
    device = [] if options.device == "cuda" or "vllm" in arguments else ["--device", "cpu"]
    log = Path(options.folder) / "service.txt"
    environment = os.environ | {"STILLHOUSE_DIE_WITH_PARENT": "1"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *device, "--port", "0", "--log-level", "warning"],
            stdout=subprocess.PIPE, stderr=file, env=environment,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if match := READY.search(line):
                yield match[1].decode()
                break
        else:
            raise RuntimeError(f"{module} ended before it was ready:\n{log.read_text(errors='replace')[-3000:]}")
    finally:
        process.terminate()
        process.wait()

"""Checks the teacher's reduction of logits to records on the device against float64 on the CPU, and times it.

Calls the public `reduce_rows`, which chooses the kernels by the device.
"""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import torch

from deploy.gpu_checks.report import Options, Report
from teacher_proto.compute.reduction import NO_TOKEN, Rows, reduce_rows
from teacher_proto.compute.sampling import sample_key
from teacher_proto.requests import TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.packed import RowLayout, unpack_rows

TEMPERATURES = (1.0, 2.0, 5.0, 0.5)
SPEC = TargetSpec(kinds=("top_k", "score", "gather", "sampled", "hidden"), top_k=64, temperatures=TEMPERATURES,
                  num_samples=16, seed=1, hidden_dtype="float16")  # fmt: skip
GATHERED = 5


def run(report: Report, options: Options) -> None:
    # More rows than the head computes logits for at a time; a vocabulary beyond 16 bits; one that no tile size divides.
    shapes = ((37, 1000), (5, 70_001)) if options.tiny else ((37, 1000), (1030, 70_001), (300, 151_936))
    for n, vocab_size in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{n} rows of {vocab_size:,} logits in {str(dtype).removeprefix('torch.')}"
            generator = torch.Generator().manual_seed(n + vocab_size)
            logits_NV = (torch.randn((n, vocab_size), generator=generator) * 3 + 7).to(dtype)
            _compare(report, name, logits_NV, options.device)


def _compare(report: Report, name: str, logits_NV: torch.Tensor, device: str) -> None:
    n, vocab_size = logits_NV.shape
    generator = torch.Generator().manual_seed(0)
    rows = Rows(
        next_ids_N=torch.cat([torch.randint(vocab_size, (n - 1,), generator=generator), torch.tensor([NO_TOKEN])]),
        gather_ids_NG=torch.randint(vocab_size, (n, GATHERED), generator=generator),
        sample_keys_N=torch.full((n,), sample_key(1, np.arange(n))),
        positions_N=torch.arange(n),
    )
    layout = RowLayout(SPEC, vocab_size, GATHERED, 1)
    there = logits_NV.to(device)
    moved = Rows(*(part if part is None else part.to(device) for part in vars(rows).values()))
    hidden_ND = torch.arange(n, device=device)[:, None].float()

    def reduced() -> bytes:
        packed = reduce_rows(hidden_ND, lambda h_nD: there[h_nD[:, 0].long()], moved, layout)
        assert packed is not None
        return packed.cpu().numpy().tobytes()

    first = reduced()
    report.check(f"{name}: two passes give the same bytes", first == reduced())
    packed_NB = np.frombuffer(first, np.uint8).reshape(n, layout.row_bytes).copy()
    record = unpack_rows(packed_NB, 0, layout)
    some = torch.tensor(sorted({*range(min(n, 12)), *range(max(0, n - 12), n)}))
    z_NV = logits_NV[some].double()
    lse_N = z_NV.logsumexp(-1)
    log_p_NV = z_NV - lse_N[:, None]
    ids_NK = torch.from_numpy(record.ids.astype(np.int64))[some]
    report.check(f"{name}: top-{SPEC.top_k} ids", torch.equal(z_NV.gather(1, ids_NK), z_NV.topk(SPEC.top_k).values))
    named = {
        "top-K logprobs": (record.logprobs, log_p_NV.gather(1, ids_NK), 2e-3),
        "lse": (record.lse, lse_N, 1e-5),
        "log_z": (record.log_z, torch.stack([(z_NV / t).logsumexp(-1) - lse_N / t for t in TEMPERATURES], 1), 1e-5),
        "gathered logprobs": (record.gather_logprobs, log_p_NV.gather(1, rows.gather_ids_NG[some]), 2e-3),
    }
    here = reduce_rows(
        some[:, None].float(), lambda h_nD: logits_NV[h_nD[:, 0].long()],
        Rows(*(part if part is None else part[some] for part in vars(rows).values())), layout,
    )  # fmt: skip
    assert here is not None and rows.next_ids_N is not None
    drawn = _same_draws(record, some.tolist(), unpack_rows(here.numpy(), 0, layout))
    report.close(f"{name}: share of draws that differ from the CPU's", 1 - drawn, 0.02)
    report.check(f"{name}: hidden states", bool((record.hidden[:, 0] == np.arange(n)).all()))
    next_N = rows.next_ids_N[some].clamp(min=0)
    true_N = log_p_NV.gather(1, next_N[:, None])[:, 0].masked_fill(rows.next_ids_N[some] == NO_TOKEN, torch.nan)
    named["next token's logprob"] = (record.next_logprob, true_N, 1e-5)
    for what, (ours, truth, bound) in named.items():
        ours_N = torch.from_numpy(np.asarray(ours, np.float64))[some]
        same_gaps = torch.equal(ours_N.isnan(), truth.isnan())
        error = ((ours_N - truth).abs() / truth.abs().clamp(min=1.0)).nan_to_num(0.0).max()
        report.close(f"{name}: {what}", float(error) if same_gaps else float("nan"), bound)


def _same_draws(record: TokenTargets, rows: list[int], reference: TokenTargets) -> float:
    """The share of the rows' draws that `reference`, which has only these rows, has too. A draw may depend on the last
    bit of a logit, if two ids are about equally likely to be drawn.
    """
    common = 0
    for place, row in enumerate(rows):
        common += (_draws(record, row) & _draws(reference, place)).total()
    return common / (len(rows) * SPEC.num_samples)


def _draws(record: TokenTargets, row: int) -> Counter[int]:
    assert record.sampled_offsets is not None and record.sampled_ids is not None and record.sampled_counts is not None
    span = slice(int(record.sampled_offsets[row]), int(record.sampled_offsets[row + 1]))
    return Counter(dict(zip(record.sampled_ids[span].tolist(), record.sampled_counts[span].tolist(), strict=True)))


def speed(report: Report, options: Options) -> None:
    """Time 1,024 rows of Qwen3's vocabulary, from existing logits."""
    n, vocab_size, rounds = (8, 5000, 2) if options.tiny else (1024, 151_936, 20)
    spec = TargetSpec(kinds=("top_k",), top_k=64, temperatures=(1.0, 2.0, 5.0))
    layout = RowLayout(spec, vocab_size)
    for dtype in (torch.float32, torch.bfloat16):
        logits_NV = torch.randn((n, vocab_size), device=options.device).to(dtype)
        hidden_ND = torch.zeros((n, 1), device=options.device)
        rows = Rows(next_ids_N=torch.zeros(n, dtype=torch.int64, device=options.device))

        def once(logits_NV: torch.Tensor = logits_NV, hidden_ND: torch.Tensor = hidden_ND, rows: Rows = rows) -> None:
            reduce_rows(hidden_ND, lambda _: logits_NV, rows, layout)

        taken_s = least_seconds(once, rounds, options.device)
        name = f"reduction of {n:,} rows of {vocab_size:,} in {str(dtype).removeprefix('torch.')}, T = 1, 2, 5, top-64"
        report.figure(name, taken_s * 1e3, "ms", "" if options.tiny else "at most 0.5")
        size = logits_NV.nbytes / taken_s
        report.figure("  logits per second", size / 1e9, "GB/s")


def least_seconds(once: object, rounds: int, device: str) -> float:
    """The shortest time of a call, after two warm-up calls."""
    assert callable(once)
    times = []
    for number in range(rounds + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        once()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - began)
    return min(times)

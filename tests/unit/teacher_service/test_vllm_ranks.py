"""Ranks that share a head's rows, as processes over gloo: together they answer what one alone would."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from teacher_proto.compute import reduction
from teacher_proto.compute.reduction import NO_TOKEN, Rows, reduce_rows
from teacher_proto.requests import TargetSpec
from teacher_proto.wire.packed import RowLayout, unpack_rows
from teacher_service.engines.vllm_ranks import SharedHead
from tests.teacher_process import free_port

V, D = 301, 16
SPEC = TargetSpec(kinds=("top_k", "gather", "sampled", "hidden"), top_k=5, temperatures=(2.0,), num_samples=7,
                  hidden_dtype="float16")  # fmt: skip
LAYOUT = RowLayout(SPEC, V, 3, D)
COUNTS = (1, 2, 3, 7, 40, 100)


def weights() -> torch.Tensor:
    return torch.randn((V, D), generator=torch.Generator().manual_seed(3))


def rows_of(n: int) -> tuple[torch.Tensor, Rows]:
    draw = torch.Generator().manual_seed(n)
    next_ids_N = torch.cat([torch.randint(V, (n - 1,), generator=draw), torch.tensor([NO_TOKEN])])
    gather_NG = torch.randint(V, (n, 3), generator=draw)
    return torch.randn((n, D), generator=draw), Rows(next_ids_N, gather_NG, torch.full((n,), 9), torch.arange(n))


def as_rank(rank: int, world: int, port: int, results: Any) -> None:
    """Puts what this rank answers for each number of rows, and whether it agrees with heads that are and aren't its."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    # Two rows a rank at a time, so that most answers take several rounds; columns are padded to whole ranks.
    reduction.HEAD_ROWS["cpu"] = 2
    columns = -(-V // world)
    padded_CD = torch.nn.functional.pad(weights(), (0, 0, 0, columns * world - V))
    own_CD = padded_CD[rank * columns : (rank + 1) * columns]
    group = dist.group.WORLD
    assert group is not None
    head = SharedHead(lambda hidden_nD: hidden_nD @ own_CD.T, V, group)
    answers = []
    for n in COUNTS:
        hidden_ND, rows = rows_of(n)
        packed = head.reduce_rows(hidden_ND, None, rows, LAYOUT)
        answers.append(None if packed is None else packed.tolist())
    whole_VD = weights()
    heads = (
        lambda h: h @ whole_VD.T,
        lambda h: h @ whole_VD.T * 2,
        lambda h: (h @ whole_VD.T)[:, : V - 1],
        lambda h: None,
        lambda h: h @ whole_VD.T * (torch.nan if rank else 1.0),
    )
    agreed = [head.agrees_with(one, torch.zeros(4, D)) for one in heads]
    results.put((rank, answers, agreed))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_answer_together_what_one_alone_would(world: int) -> None:
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=as_rank, args=(rank, world, port, results)) for rank in range(world)]
    for process in processes:
        process.start()
    told = {rank: rest for rank, *rest in (results.get(timeout=120) for _ in processes)}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    for n, answer in zip(COUNTS, told[0][0], strict=True):
        hidden_ND, rows = rows_of(n)
        alone = reduce_rows(hidden_ND, lambda h: h @ weights().T, rows, LAYOUT)
        assert alone is not None
        ours, expected = (unpack_rows(packed.numpy(), 0, LAYOUT) for packed in (torch.tensor(answer).byte(), alone))
        assert ours.tensors().keys() == expected.tensors().keys()
        for name, array in ours.tensors().items():
            # Products of other shapes round otherwise in a last bit.
            within = 2e-3 if array.dtype.kind == "f" else 0
            np.testing.assert_allclose(array, expected.tensors()[name], rtol=0, atol=within, err_msg=name)
    assert all(answer is None for rank in range(1, world) for answer in told[rank][0])
    assert all(agreed == [True, False, False, False, False] for _, agreed in told.values())

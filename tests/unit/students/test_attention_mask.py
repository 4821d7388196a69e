"""Masks of packed rows: flex attention's lists of blocks against those that torch makes of the dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from student_trainer.batch.view import CausalDocuments
from student_trainer.students.attention_mask import BLOCK, block_mask, dense_mask


def packed(*rows: tuple[int, ...], length: int) -> Tensor:
    """Document ids of rows that hold documents of these lengths, then padding."""
    ids_BT = torch.full((len(rows), length), -1, dtype=torch.int32)
    for ids_T, sizes in zip(ids_BT, rows, strict=True):
        start = 0
        for number, size in enumerate(sizes):
            ids_T[start : start + size] = number
            start += size
    return ids_BT


SHAPES = {
    "edges within blocks": packed((100, 200, 300), (5, 5, 500), (600,), (1,) * 500, length=640),
    "edges between blocks": packed((128, 256, 128), (384, 128), (512,), (), length=512),
    "a last block that is not full": packed((50, 250), (290,), (128, 128, 44), length=300),
    "less than a block": packed((3, 4), (7,), length=7),
}
WINDOWS = (None, 1, 64, 128, 129, 300)


def lists(mask: Any) -> list[list[list[int]]]:
    """Block by block, the keys that are listed: partly seen, then wholly; by rows of queries, then of keys."""
    found = []
    for counts, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
        (mask.q_num_blocks, mask.q_indices),
        (mask.full_q_num_blocks, mask.full_q_indices),
    ):
        found.append(
            [sorted(row[:count].tolist()) for count, row in zip(counts.flatten(), indices.flatten(0, 2), strict=True)]
        )
    return found


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_packed_rows_are_exactly_those_of_the_dense_mask(shape: str, window: int | None) -> None:
    ids_BT = SHAPES[shape]
    rows, length = ids_BT.shape
    ours = block_mask(CausalDocuments(ids_BT), window)
    theirs = create_block_mask(ours.mask_mod, rows, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    assert lists(ours) == lists(theirs)
    assert ours.seq_lengths == theirs.seq_lengths
    assert torch.equal(
        create_mask(ours.mask_mod, rows, 1, length, length, device="cpu"), dense_mask(CausalDocuments(ids_BT), window)
    )


@pytest.mark.parametrize("window", [None, 100])
def test_documents_whose_tokens_lie_apart_lose_nothing(window: int | None) -> None:
    ids_BT = torch.randint(-1, 3, (2, 400), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids_BT[1] = 2
    ours = block_mask(CausalDocuments(ids_BT), window)
    theirs = create_block_mask(ours.mask_mod, 2, None, 400, 400, device="cpu", BLOCK_SIZE=BLOCK)
    partly, wholly, *_ = lists(ours)
    their_partly, their_wholly, *_ = lists(theirs)
    assert wholly == their_wholly
    assert all(set(theirs_) <= set(ours_) for ours_, theirs_ in zip(partly, their_partly, strict=True))


class LargestOutput(TorchDispatchMode):
    """How many entries the largest tensor has that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_no_dense_array_comes_into_being() -> None:
    ids_BT = packed((700, 1000, 300), (2048,), length=2048)
    with LargestOutput() as largest:
        block_mask(CausalDocuments(ids_BT), 500)
    assert 0 < largest.entries <= 2 * ids_BT.numel()

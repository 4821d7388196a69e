"""Masks of packed rows: flex attention's lists of blocks against those that torch makes of the dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from student_trainer.batch.view import NEVER, CausalDocuments, OrderedDocuments
from student_trainer.students.attention_mask import BLOCK, block_mask, dense_mask
from tests.block_diffusion import noisy_beside_clean


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


def halves(documents_BT: Tensor, block: int) -> OrderedDocuments:
    """Block diffusion's rows: what is noisy, then what is clean, of documents in blocks."""
    places_BT = torch.zeros_like(documents_BT)
    for documents_T, places_T in zip(documents_BT, places_BT, strict=True):
        for number in documents_T.unique():
            mine = documents_T == number
            places_T[mine] = torch.arange(int(mine.sum()), dtype=torch.int32)
    return noisy_beside_clean(documents_BT.numpy(), places_BT.numpy(), block)


def prefixes(documents_BT: Tensor, length: int) -> OrderedDocuments:
    """Each document's first tokens are seen by all of it, the others by what comes after them."""
    places_BT = torch.arange(documents_BT.shape[1], dtype=torch.int32).expand_as(documents_BT)
    order_BT = places_BT.clamp(min=length - 1)
    return OrderedDocuments(documents_BT, order_BT, order_BT, torch.full_like(documents_BT, -1), places_BT)


ORDERED = {
    "blocks of 4": halves(packed((50, 70), (120,), (), length=120), 4),
    "blocks of 32": halves(packed((100, 60, 96), (256,), length=256), 32),
    "blocks as large as the kernel's": halves(packed((384,), (128, 256), length=384), BLOCK),
    "a prefix": prefixes(packed((300,), (100, 200), length=300), 140),
}


def visible(attention: OrderedDocuments, window: int | None) -> Tensor:
    """The definition in `OrderedDocuments`, pair by pair."""
    documents, shown, sees, groups, places = (
        values_BT.tolist()
        for values_BT in (
            attention.document_ids_BT, attention.shown_at_BT, attention.sees_to_BT, attention.groups_BT,
            attention.places_BT,
        )
    )  # fmt: skip
    rows, length = attention.document_ids_BT.shape
    seen_BTT = torch.zeros(rows, length, length, dtype=torch.bool)
    for b in range(rows):
        for q in range(length):
            for k in range(length):
                by_order = shown[b][k] <= sees[b][q]
                by_group = groups[b][k] == groups[b][q] >= 0
                near = window is None or places[b][q] - places[b][k] < window
                seen_BTT[b, q, k] = documents[b][q] == documents[b][k] and (by_order or by_group) and near
    return seen_BTT


@pytest.mark.parametrize("window", [None, 3, 64])
@pytest.mark.parametrize("name", ORDERED)
def test_the_general_form_is_its_definition_dense_and_in_blocks(name: str, window: int | None) -> None:
    attention = ORDERED[name]
    rows, length = attention.document_ids_BT.shape
    dense_B1TT = dense_mask(attention, window)
    if length < 300:
        assert torch.equal(dense_B1TT[:, 0], visible(attention, window))
    assert dense_B1TT.any(-1).all(), "a row of the softmax is empty"
    ours = block_mask(attention, window)
    assert torch.equal(create_mask(ours.mask_mod, rows, 1, length, length, device="cpu"), dense_B1TT)
    theirs = create_block_mask(ours.mask_mod, rows, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    for which, (mine, needed) in enumerate(zip(lists(ours), lists(theirs), strict=True)):
        for listed_here, listed_there in zip(mine, needed, strict=True):
            if which % 2:  # seen wholly: nothing that isn't, and what is wholly seen may be listed as partly
                assert set(listed_here) <= set(listed_there)
    every = [[set(a) | set(b) for a, b in zip(mask[0], mask[1], strict=True)] for mask in (lists(ours), lists(theirs))]
    assert all(needed_here <= ours_here for ours_here, needed_here in zip(*every, strict=True)), "a block is missing"


def test_blocks_of_block_diffusion_are_exactly_those_that_are_needed() -> None:
    """Where its blocks are the kernel's: the noisy half against itself is a diagonal, nothing else is listed."""
    attention = ORDERED["blocks as large as the kernel's"]
    ours = block_mask(attention)
    theirs = create_block_mask(ours.mask_mod, 2, None, 768, 768, device="cpu", BLOCK_SIZE=BLOCK)
    assert lists(ours) == lists(theirs)
    assert lists(ours)[1][:3] == [[0], [1, 3], [2, 3, 4]]


def test_the_general_form_makes_no_dense_array_either() -> None:
    attention = halves(packed((700, 300), (1024,), length=1024), 32)
    with LargestOutput() as largest:
        block_mask(attention, 500)
    assert 0 < largest.entries <= 2 * attention.document_ids_BT.numel()


def test_a_causal_clean_half_sees_no_token_after_its_own() -> None:
    """As NBDiff trains it: the order within the clean half is that of the places, not of the blocks."""
    documents_BT = packed((9, 6), length=15)
    blockwise = halves(documents_BT, 4)
    places_BT = blockwise.places_BT.clone()
    clean = blockwise.shown_at_BT != NEVER
    attention = OrderedDocuments(
        blockwise.document_ids_BT,
        torch.where(clean, places_BT, NEVER),
        torch.where(clean, places_BT, places_BT // 4 * 4 - 1),
        blockwise.groups_BT,
        places_BT,
    )
    seen_TT, blocks_TT = dense_mask(attention)[0, 0], dense_mask(blockwise)[0, 0]
    causal_TT = dense_mask(CausalDocuments(documents_BT))[0, 0]
    assert torch.equal(seen_TT[15:, 15:], causal_TT)
    assert torch.equal(seen_TT[:15], blocks_TT[:15]) and not seen_TT[15:, :15].any()
    assert torch.equal(attention.clean_documents_BT[:, 15:], documents_BT)
    assert (attention.clean_documents_BT[:, :15] == -1).all()

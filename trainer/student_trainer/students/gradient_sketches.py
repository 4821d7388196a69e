"""Gradients by source, projected to a few thousand numbers, from passes that are made anyway. Made and read by
`evaluation.influence`.

    with sketches.watching(micro):      around a forward pass; its backward pass adds to `sketches.take()`

No attention crosses a document boundary, so the gradient at a position of a layer's output belongs only to the source
of its document. The chosen modules work position by position: each is computed again for the positions of one source,
and differentiated with the gradients that arrived there. That gives exactly the gradient of that source's part of the
loss with respect to the module's trained parameters: weights, latent weights of a quantiser, or an adapter's.

A sketch adds every number, times a random sign, to one of `size` sums: inner products are kept to about
1 / sqrt(size) of the product of the norms. Signs and places are hashes of the parameter's name and the place in it, the
same on every device and rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.ranks import full_tensor
from student_trainer.students.student import Student

CHUNK = 2**22  # numbers of a matrix that are hashed at a time
MULTIPLY_A, MULTIPLY_B = -7046029254386353131, -4658895280553007687  # of SplitMix64, as signed numbers


@dataclass(frozen=True, eq=False)
class Chosen:
    """A module whose gradient is sketched. `parameters`: the full name of each trained one to its name in the module.

    They are looked up each time: FSDP replaces them while a layer is gathered.
    """

    module: nn.Module
    parameters: Mapping[str, str]


def choose(model: nn.Module, names: tuple[str, ...], count: int) -> list[Chosen]:
    """At most `count` modules of these names, evenly spread over the last third of those with something to train.

    ValueError if there is none.
    """
    found = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            own = {f"{name}.{each}": each for each, p in module.named_parameters() if p.requires_grad}
            found += [Chosen(module, own)] if own else []
    last = found[-max(1, len(found) // 3) :] if found else []
    if not last:
        raise ValueError(
            f"data.mixture.modules: nothing is trained in modules named {' or '.join(names)}; name trained ones, "
            "such as q_proj with a LoRA on the attention"
        )
    # `count` of them from the first to the last, as evenly as whole numbers allow.
    places = {round(i * (len(last) - 1) / max(1, count - 1)) for i in range(count)} if count > 1 else {len(last) - 1}
    return [last[place] for place in sorted(places)]


class GradientSketches:
    """Sketches of `sources` sources, `size` numbers each. `scales`: factor on the gradient, by parameter."""

    def __init__(self, student: Student, chosen: list[Chosen], sources: int, size: int, seed: int):
        self._student, self._chosen, self._sources, self._size, self._seed = student, chosen, sources, size, seed
        self.scales: Mapping[str, Tensor] = {}
        self._passes: list[Tensor] = []  # [sources, size] per pass, added up by `take`

    @contextmanager
    def watching(self, micro: MicroBatch, one_source: bool = False) -> Iterator[None]:
        """Around a forward pass whose backward pass, whenever it comes, is sketched. `one_source`: all as source 0."""
        sources_P = sources_of_positions(micro)
        if one_source:
            sources_P = sources_P.clamp_max(0)
        # A pass has its own sums, which `take` adds in order: their bits don't depend on the passes before.
        sums = torch.zeros(self._sources, self._size, device=self._student.device)
        self._passes.append(sums)
        handles = [
            each.module.register_forward_hook(partial(self._follow, each, sources_P, sums)) for each in self._chosen
        ]
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
                yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> Tensor:
        """[sources, size] float32 on the CPU: the sum over the passes since the last call."""
        total = torch.zeros(self._sources, self._size)
        for sums in self._passes:
            total += sums.cpu()
        self._passes = []
        return total

    def _follow(
        self, each: Chosen, sources_P: Tensor, sums: Tensor, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            # What arrives at the output in the backward pass is d loss / d output [P, O]; the input is kept for it.
            output.register_hook(partial(self._add, each, sources_P, sums, args[0].detach()))

    def _add(self, each: Chosen, sources_P: Tensor, sums: Tensor, input: Tensor, gradient: Tensor) -> None:
        input_PD, gradient_PD = input.reshape(-1, input.shape[-1]), gradient.detach().reshape(-1, gradient.shape[-1])
        assert len(input_PD) == len(sources_P), "a module whose input is not one row per position"
        for source in sources_P.unique().tolist():
            if source < 0:
                continue
            rows = (sources_P == source).nonzero()[:, 0]
            # The module again, for this source's positions only: y_R = f(x_R; w) with a graph to w.
            with torch.enable_grad(), self._student.autocast():
                output_RD = each.module.forward(input_PD[rows])
            parameters = [each.module.get_parameter(own) for own in each.parameters.values()]
            upstream_RD = gradient_PD[rows].to(output_RD.dtype)
            # Vector-Jacobian product with the gradient that arrived there: d (this source's loss) / d w.
            parts = torch.autograd.grad(output_RD, parameters, upstream_RD, allow_unused=True)
            for name, part in zip(each.parameters, parts, strict=True):
                if part is not None:
                    sums[source] += self._sketch(name, part)

    def _sketch(self, name: str, gradient: Tensor) -> Tensor:
        # A sharded gradient is gathered: places in the sketch follow from those in the full tensor.
        gradient = full_tensor(gradient).float()
        if name in self.scales:
            gradient = gradient * self.scales[name]
        return sketch(gradient, self._size, zlib.crc32(name.encode()) ^ self._seed)


def sources_of_positions(micro: MicroBatch) -> Tensor:
    """[B * T] of the view: the source of each position's document; -1 at padding and in documents without a label,
    from which no gradient comes.
    """
    view = micro.view
    documents_BT = view.attention.document_ids_BT.long()
    rows = len(documents_BT)
    most = int(documents_BT.max()) + 2 if documents_BT.numel() else 1  # place 0 of each row is its padding
    row_BT = torch.arange(rows, device=documents_BT.device)[:, None]
    places_P = (row_BT * most + documents_BT + 1).flatten()
    table = torch.full((rows * most,), -1, dtype=torch.long, device=documents_BT.device)
    # A label's row lies in its document, so each document with a label gets its source.
    table[places_P[view.rows_N]] = micro.sources_N
    # Padding has place 0 of its row, which must be -1.
    table[torch.arange(rows, device=table.device) * most] = -1
    return table[places_P]


def sketch(values: Tensor, size: int, seed: int) -> Tensor:
    """[size] float32: the sketch of a tensor taken as a matrix (its first dimension by all others), see the module.
    `size`: a power of two.
    """
    matrix_OI = values.reshape(len(values), -1) if values.dim() > 1 else values.reshape(1, -1)
    columns = matrix_OI.shape[1]
    padding = -columns % size
    column_I = torch.arange(columns, device=values.device)
    slot_S = torch.arange(size, device=values.device)
    total = torch.zeros(size, device=values.device)
    height = max(1, CHUNK // max(columns, size))
    for first in range(0, len(matrix_OI), height):
        part_OI = matrix_OI[first : first + height]
        row_O = torch.arange(first, first + len(part_OI), device=values.device)
        # A sign for each number, by its row and column: products of different numbers cancel on average.
        signed_OI = part_OI * _sign(_hash(row_O[:, None] * 2**32 + column_I, seed))
        # Columns that are `size` apart share a place: a cheap fold instead of a scatter.
        folded_OS = nn.functional.pad(signed_OI, (0, padding)).reshape(len(part_OI), -1, size).sum(1)
        # Each row is permuted in its own way, by an odd stride, so that a column's numbers are spread.
        start_O1, stride_O1 = (_hash(row_O, seed ^ salt)[:, None] & 0x7FFFFFFF for salt in (0x5EED, 0x51DE))
        # Odd strides are bijections modulo a power of two, so `& (size - 1)` permutes the row's places.
        total += folded_OS.gather(1, (slot_S * (stride_O1 | 1) + start_O1) & (size - 1)).sum(0)
    return total


def _hash(places: Tensor, seed: int) -> Tensor:
    """SplitMix64 of int64 numbers; products wrap."""
    mixed = (places + seed) * MULTIPLY_A
    # Shifts of signed numbers extend the sign; the masks make them the unsigned shifts of SplitMix64.
    mixed = (mixed ^ ((mixed >> 30) & (2**34 - 1))) * MULTIPLY_B
    return mixed ^ ((mixed >> 27) & (2**37 - 1))


def _sign(hashed: Tensor) -> Tensor:
    # Bit 33 of the hash: 0 or 1 to +1 or -1. The low bits decide the order of places.
    return 1.0 - 2.0 * ((hashed >> 33) & 1)

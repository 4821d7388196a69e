"""Sketched gradients of single documents: short vectors whose inner products equal those of the gradients on average.

Called by `measure`. The gradient is that of the training loss with respect to some parameters, by default the MLPs'
output projections, as in the paper's code. A sketch adds each coordinate, with a random sign, to one of R buckets
(count sketch): its inner products are unbiased, with an error of about sqrt(2 / R) relative to the norms. The map is
drawn once and kept in memory, since it serves thousands of documents; `students.gradient_sketches`, for sharded
gradients, computes it by hashing each time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.losses.terms import Term
from student_trainer.students.student import Student

OUTPUTS = r"\.(down_proj|fc2|c_proj|dense_4h_to_h|w2)\.weight$"  # under the names that models give them
MOST_COORDINATES = 2**24  # if more match, a random subset is used


def chosen_parameters(model: nn.Module, pattern: str = OUTPUTS) -> dict[str, nn.Parameter]:
    """The trained parameters whose names match `pattern`. ValueError if there are none."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = {name: parameter for name, parameter in trained.items() if re.search(pattern, name)}
    if not chosen:
        some = list(trained)[:: max(1, len(trained) // 5)]
        raise ValueError(
            f"no trained parameter's name matches {pattern!r}; set --parameters to match names like {', '.join(some)}"
        )
    return chosen


class Sketch:
    """A fixed random map from the gradient of `parameters` to R numbers."""

    def __init__(self, parameters: Sequence[Tensor], size: int, seed: int) -> None:
        self.size = size
        draw = np.random.default_rng([seed, 0x5EED])
        # With more coordinates the map itself would be as large as the model.
        share = min(1.0, MOST_COORDINATES / sum(parameter.numel() for parameter in parameters))
        self._maps: list[tuple[Tensor | None, Tensor, Tensor]] = []
        for parameter in parameters:
            count = parameter.numel() if share == 1 else max(1, int(share * parameter.numel()))
            # Drawn with replacement: a coordinate drawn twice counts twice, in every document's gradient alike.
            places = None if share == 1 else torch.from_numpy(draw.integers(0, parameter.numel(), count))
            buckets = torch.from_numpy(draw.integers(0, size, count))
            signs = torch.from_numpy(draw.integers(0, 2, count).astype(np.float32) * 2 - 1)
            device = parameter.device
            at = None if places is None else places.to(device)
            self._maps.append((at, buckets.to(device), signs.to(device)))

    def __call__(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """[R] float32, on the CPU."""
        made_R = torch.zeros(self.size, device=self._maps[0][1].device)
        for gradient, (places, buckets, signs) in zip(gradients, self._maps, strict=True):
            if gradient is not None:
                values = gradient.flatten().float()
                # s_b = sum of sign_i g_i over all i in bucket b. E <s, s'> = <g, g'>: terms of different i cancel.
                made_R.index_add_(0, buckets, signs * (values if places is None else values[places]))
        return made_R.cpu()


@contextmanager
def differentiating(student: Student, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block, only these parameters have gradients, and there is no dropout."""
    before = {parameter: parameter.requires_grad for parameter in student.model.parameters()}
    was_training = student.model.training
    try:
        student.model.eval().requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
        student.model.train(was_training)


def document_gradient(
    student: Student, views: Sequence[MicroBatch], terms: tuple[Term, ...], chunk_rows: int | None,
    parameters: Sequence[nn.Parameter],
) -> list[Tensor | None]:  # fmt: skip
    """The gradient of the loss on one document, summed over its views; None where there is no gradient."""
    if not views:
        return [None] * len(parameters)
    # Sums, not means: a long document has as much effect as its tokens have in training.
    total = sum(student.loss(view, terms, chunk_rows).total for view in views)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, list(parameters), allow_unused=True))


def noise(size: int) -> float:
    """The typical error of a cosine between sketches."""
    return math.sqrt(2 / size)

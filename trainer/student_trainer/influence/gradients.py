"""Gradients of single documents, sketched: short vectors whose inner products are those of the gradients, on average.

Called by `measure`. The gradient is that of the loss which the run trains on, at some of the parameters: by default the
MLPs' output projections, as in the paper's code. A sketch adds each coordinate, with a random sign, to one of R places
(count sketch): its inner products are unbiased, and off by about sqrt(2 / R) of the lengths. The map is drawn once and
held, for it serves thousands of documents; `students.gradient_sketches`, for gradients in shards, hashes it anew.
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

OUTPUTS = r"\.(down_proj|fc2|c_proj|dense_4h_to_h|w2)\.weight$"  # by the names that models have for them
MOST_COORDINATES = 2**24  # of all that match, a random part


def chosen_parameters(model: nn.Module, pattern: str = OUTPUTS) -> dict[str, nn.Parameter]:
    """Those that are trained and whose names match. ValueError where there are none."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = {name: parameter for name, parameter in trained.items() if re.search(pattern, name)}
    if not chosen:
        some = list(trained)[:: max(1, len(trained) // 5)]
        raise ValueError(
            f"no trained parameter's name matches {pattern!r}; give --parameters, names are like {', '.join(some)}"
        )
    return chosen


class Sketch:
    """A fixed random map from the gradient at `parameters` to R numbers."""

    def __init__(self, parameters: Sequence[Tensor], size: int, seed: int) -> None:
        self.size = size
        draw = np.random.default_rng([seed, 0x5EED])
        # Beyond that many coordinates the map itself would be as large as the model.
        share = min(1.0, MOST_COORDINATES / sum(parameter.numel() for parameter in parameters))
        self._maps: list[tuple[Tensor | None, Tensor, Tensor]] = []
        for parameter in parameters:
            count = parameter.numel() if share == 1 else max(1, int(share * parameter.numel()))
            # Drawn with replacement: a coordinate drawn twice counts twice, the same in every document's gradient.
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
                # s_b = sum of sign_i g_i over the i of bucket b: E <s, s'> = <g, g'>, unlike i cancel on average.
                made_R.index_add_(0, buckets, signs * (values if places is None else values[places]))
        return made_R.cpu()


@contextmanager
def differentiating(student: Student, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters take gradients, and the student rests: no dropout."""
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
    """Of the loss on one document, all its views together; None where nothing of it is learnt."""
    if not views:
        return [None] * len(parameters)
    # Sums, not means: a long document pulls as hard as its tokens do in training.
    total = sum(student.loss(view, terms, chunk_rows).total for view in views)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, list(parameters), allow_unused=True))


def noise(size: int) -> float:
    """By how much a sketched cosine is off."""
    return math.sqrt(2 / size)

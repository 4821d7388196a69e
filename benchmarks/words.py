"""Accuracy of words alone on `data=movie_reviews`: logistic regression, no model. `make bench-words`, seconds.

A classifier below these accuracies is no better than a bag of words. The strength of the L2 penalty (C as in
scikit-learn: sum of losses + |w|^2 / 2C) is chosen on the validation split; the test split is read only with the chosen
one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.report import report

STRENGTHS = (0.1, 0.3, 1.0, 5.0)
ITERATIONS = 60
WORD = re.compile(r"\b\w\w+\b")


def terms(text: str, longest: int) -> set[str]:
    """The n-grams of up to `longest` words of a text."""
    words = WORD.findall(text.lower())
    return {" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)}


class Words:
    """Makes texts rows of a sparse matrix over the training texts' n-grams. `tf_idf`: weighted, rows of length 1."""

    def __init__(self, texts: Sequence[str], longest: int, tf_idf: bool) -> None:
        self._longest, self._tf_idf = longest, tf_idf
        counts = Counter(term for text in texts for term in terms(text, longest))
        self._columns = {term: column for column, term in enumerate(counts)}
        self._idf = [math.log((1 + len(texts)) / (1 + count)) + 1 for count in counts.values()]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[texts, terms] in float64, with a last column of ones."""
        rows, columns, values = [], [], []
        for row, text in enumerate(texts):
            found = [self._columns[term] for term in terms(text, self._longest) if term in self._columns]
            weights = [self._idf[column] if self._tf_idf else 1.0 for column in found]
            norm = math.hypot(*weights) if self._tf_idf else 1.0
            rows += [row] * (len(found) + 1)
            columns += [*found, len(self._columns)]
            values += [*(weight / norm for weight in weights), 1.0]
        shape = (len(texts), len(self._columns) + 1)
        return torch.sparse_coo_tensor(
            torch.tensor([rows, columns]), torch.tensor(values).double(), shape, check_invariants=True
        ).coalesce()


def fit(features_ND: Tensor, sign_N: Tensor, strength: float) -> Tensor:
    """Weights that minimise the regularised logistic loss; the last, of the column of ones, is not penalised."""
    weights_D = torch.zeros(features_ND.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights_D], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = softplus(-sign_N * (features_ND @ weights_D)).sum() + (weights_D[:-1] ** 2).sum() / (2 * strength)
        value.backward()
        return value

    solver.step(loss)
    return weights_D.detach()


def accuracy(features_ND: Tensor, sign_N: Tensor, weights_D: Tensor) -> float:
    """Accuracy in per cent."""
    return 100 * ((features_ND @ weights_D > 0) == (sign_N > 0)).double().mean().item()


def examples(split: str) -> tuple[list[str], Tensor]:
    """Texts, and +1 (positive) or -1 for each."""
    from student_trainer.data.sentiment import open_collection

    reviews = open_collection("movie_reviews", split)
    return list(reviews["text"]), torch.tensor([1.0 if label == "positive" else -1.0 for label in reviews["label"]])


def main() -> None:
    splits = {split: examples(split) for split in ("train", "validation", "test")}
    texts, sign_N = splits["train"]
    majority = 1.0 if sign_N.mean() >= 0 else -1.0
    shares = [100 * (splits[split][1] == majority).double().mean().item() for split in ("validation", "test")]
    rows = [{"features": "none: the commoner class", "C": None, "validation %": shares[0], "test %": shares[1]}]
    kinds = {"words": (1, False), "words and pairs": (2, False), "words, tf-idf": (1, True)}
    for name, (longest, tf_idf) in kinds.items():
        words = Words(texts, longest, tf_idf)
        by_split = {split: (words(found), signs) for split, (found, signs) in splits.items()}
        models = {strength: fit(by_split["train"][0], sign_N.double(), strength) for strength in STRENGTHS}
        scores = {strength: accuracy(*by_split["validation"], weights) for strength, weights in models.items()}
        best = max(scores, key=lambda strength: scores[strength])
        test = accuracy(*by_split["test"], models[best])
        rows.append({"features": name, "C": best, "validation %": scores[best], "test %": test})
    sizes = ", ".join(f"{len(found):,} {split}" for split, (found, _) in splits.items())
    report("words", rows, title=f"logistic regression on film reviews: {sizes}",
           notes=("one split; the standard error of a figure is 1.2 (validation) or 0.9 (test) points",))  # fmt: skip


if __name__ == "__main__":
    main()

"""The arithmetic of influence: cosines, weights as the best of a small problem, neighbours."""

from __future__ import annotations

import pytest
import torch

from student_trainer.influence import scores
from student_trainer.influence.scores import Propagation, alignments, rank_correlation, sample_weights, trust


def test_alignments_are_cosines_summed_over_the_targets() -> None:
    gradients = torch.tensor([[1.0, 0, 2, 0], [0, 1, -1, 1], [0.5, 0.5, 0, -1], [0, 0, 0, 0]])
    target = torch.tensor([[1.0, 1, 1, 0]])
    expected = torch.tensor([0.774597, 0, 0.471405, 0], dtype=torch.float64)
    assert torch.allclose(alignments(gradients, target), expected, atol=1e-6)
    assert torch.allclose(alignments(7 * gradients, torch.cat([target, 2 * target])), 2 * expected, atol=1e-6)


def test_weights_of_a_worked_example() -> None:
    assert torch.allclose(
        sample_weights(torch.tensor([1.0, 0.0, -1.0]), 1.0),
        torch.tensor([2.112372, 0.887628, 0.0], dtype=torch.float64),
        atol=1e-6,
    )
    assert sample_weights(torch.tensor([1.0, 2.0]), 0.0).tolist() == [1, 1]
    assert sample_weights(torch.tensor([3.0, 3.0]), 1.0).tolist() == [1, 1]


@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0])
def test_weights_are_the_best_that_there_are(strength: float) -> None:
    torch.manual_seed(0)
    influence = torch.randn(50, dtype=torch.float64) * 3 + 7
    weights = sample_weights(influence, strength)
    assert weights.min() >= 0 and weights.mean() == pytest.approx(1)
    penalty = influence.std(correction=0) / strength

    def gain(w: torch.Tensor) -> float:
        return float(influence @ w - penalty / 2 * (w @ w))

    for _ in range(200):
        other = weights + 0.1 * torch.randn(50, dtype=torch.float64)
        other = other.clamp_min(0)
        other = other * 50 / other.sum()
        assert gain(other) <= gain(weights) + 1e-9


def test_neighbours_tell_influence() -> None:
    torch.manual_seed(1)
    embeddings = torch.randn(600, 6)
    influence = torch.tanh(embeddings[:, 0]) + embeddings[:, 1] ** 2 / 3
    landmarks = torch.arange(0, 600, 3)
    found = Propagation.of(embeddings[landmarks], influence[landmarks])(embeddings)
    others = torch.ones(600, dtype=torch.bool)
    others[landmarks] = False
    assert rank_correlation(found[others], influence[others]) > 0.9
    assert trust(embeddings[landmarks], influence[landmarks]) > 0.85
    assert abs(trust(torch.randn(200, 6), influence[landmarks])) < 0.3, "embeddings that know nothing are found out"


def test_far_from_all_landmarks_it_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "ROWS", 1)
    propagation = Propagation.of(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 2.0, 6.0]), damping=1e-9)
    at = propagation(torch.tensor([[1.0], [1e6]]))
    assert at[0] == pytest.approx(2, abs=1e-4) and at[1] == pytest.approx(3)


def test_rank_correlation() -> None:
    assert rank_correlation(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0.1, 0.2, 0.9])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([3.0, 2.0, 1.0])) == pytest.approx(-1)

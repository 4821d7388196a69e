"""Oracles: Newton-Schulz in NumPy, and attention logits in float64 from a layer's input, all written out anew."""

from typing import Any

import numpy as np
from torch import Tensor


def newton_schulz(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """Jordan's quintic iteration in float64: X <- aX + (bA + cA^2)X with A = X X^T, on the shorter side."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.sqrt((x * x).sum())
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def rotate(states_BHTd: np.ndarray, positions_BT: np.ndarray, theta: float) -> np.ndarray:
    """RoPE as a product of complex numbers: feature i goes with feature i + d/2."""
    half = states_BHTd.shape[-1] // 2
    turn_BTh = positions_BT[:, :, None] * theta ** (-np.arange(half) / half)
    z = (states_BHTd[..., :half] + 1j * states_BHTd[..., half:]) * np.exp(1j * turn_BTh)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def largest_logits(model: Any, layer: int, run: Any, documents_BT: Tensor, positions_BT: Tensor) -> list[float]:
    """For each query head the largest logit of one layer, over pairs of one document with key not after query.

    Only the outputs of the layer's own projections are taken from the model, through hooks; `run` runs it.
    """
    attention = model.model.layers[layer].self_attn
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output.detach().double().numpy())

    handles = [attention.q_proj.register_forward_hook(keep("q")), attention.k_proj.register_forward_hook(keep("k"))]
    run()
    for handle in handles:
        handle.remove()
    config = model.config
    heads, key_heads, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    query, key = (
        seen[name].reshape(*documents_BT.shape, count, width) for name, count in (("q", heads), ("k", key_heads))
    )
    if hasattr(attention, "q_norm"):
        query, key = (
            states
            / np.sqrt((states**2).mean(-1, keepdims=True) + config.rms_norm_eps)
            * norm.weight.detach().double().numpy()
            for states, norm in ((query, attention.q_norm), (key, attention.k_norm))
        )
    theta = config.rope_parameters["rope_theta"]
    positions = positions_BT.numpy()
    query, key = (rotate(states.swapaxes(1, 2), positions, theta) for states in (query, key))
    documents = documents_BT.numpy()
    largest = []
    for head in range(heads):
        logits_BTT = query[:, head] @ key[:, head // (heads // key_heads)].swapaxes(1, 2) / np.sqrt(width)
        best = -np.inf
        for row, owner in enumerate(documents):
            for q in range(len(owner)):
                for k in range(q + 1):
                    if owner[q] == owner[k] >= 0:
                        best = max(best, logits_BTT[row, q, k])
        largest.append(float(best))
    return largest

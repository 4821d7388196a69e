"""Packed rows leak nothing: a document's hidden states, loss and gradient are the same alone, packed and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from student_trainer.batch.view import CausalDocuments
from student_trainer.settings import StudentSettings
from student_trainer.students.attention_mask import dense_mask
from student_trainer.students.causal import wrap_causal
from student_trainer.students.student import Student

V = 97
BASE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
ARCHITECTURES: dict[str, Any] = {
    "llama": LlamaConfig(**BASE),
    "qwen2": Qwen2Config(**BASE),
    "qwen3": Qwen3Config(**BASE, head_dim=8),
    "gemma2, cap and windows": Gemma2Config(**BASE, head_dim=8, sliding_window=4, final_logit_softcapping=3.0),
    "gemma3, windows": Gemma3TextConfig(**BASE, head_dim=8, sliding_window=4),
    "mistral, window": MistralConfig(**BASE, sliding_window=4),
    "phi3, window": Phi3Config(**BASE, sliding_window=4),
    "granite, scaled logits": GraniteConfig(**BASE, logits_scaling=4.0),
    "cohere, scaled logits": CohereConfig(**BASE, logit_scale=0.25),
    "bitnet": BitNetConfig(**BASE),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_head=4, n_layer=2, bos_token_id=1, eos_token_id=2),
}


def student_of(config: Any, **settings: Any) -> Student:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    student = wrap_causal(model, "sdpa", StudentSettings(checkpoint_path="x", **settings))
    # Dropout would make two passes differ by itself.
    student.model.eval()
    return student


def logits(student: Student, hidden_BTD: torch.Tensor) -> torch.Tensor:
    head = student.head
    z = torch.nn.functional.linear(hidden_BTD, head.weight_VD, head.bias_V) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def packed(*lengths: int, pad: int = 0) -> tuple[torch.Tensor, CausalDocuments]:
    """Position ids [1, T] and attention of documents one after another."""
    positions = torch.cat([torch.arange(length) for length in lengths] + [torch.zeros(pad, dtype=torch.long)])
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((pad,), -1)])
    return positions[None], CausalDocuments(documents[None])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_document_computes_the_same_alone_packed_and_padded(name: str) -> None:
    student = student_of(ARCHITECTURES[name])
    student.model.double()  # in float32 the kernels' rounding depends on the length of a row
    a, b = torch.randint(0, V, (1, 11)), torch.randint(0, V, (1, 9))
    with torch.no_grad():
        # Alone, by the model's own forward pass: an oracle that knows nothing of packing.
        alone_a, alone_b = student.model(a).logits, student.model(b).logits
        row = torch.cat([a, b, torch.zeros(1, 4, dtype=torch.long)], 1)
        together = logits(student, student.body(row, *packed(11, 9, pad=4)))
    assert torch.allclose(together[:, :11], alone_a, rtol=0, atol=1e-12)
    assert torch.allclose(together[:, 11:20], alone_b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_documents_gradient_does_not_depend_on_its_neighbours(checkpointing: bool) -> None:
    student = student_of(ARCHITECTURES["llama"], gradient_checkpointing=checkpointing)
    student.model.train()
    a, b = torch.randint(0, V, (1, 11)), torch.randint(0, V, (1, 9))

    def gradients(row: torch.Tensor, place: slice, *lengths: int) -> list[torch.Tensor]:
        student.model.zero_grad()
        z = logits(student, student.body(row, *packed(*lengths)))[0, place]
        torch.nn.functional.cross_entropy(z[:-1], a[0, 1:], reduction="sum").backward()
        return [p.grad.clone() for p in student.model.parameters() if p.grad is not None]

    alone = gradients(a, slice(0, 11), 11)
    behind = gradients(torch.cat([b, a], 1), slice(9, 20), 9, 11)
    for one, other in zip(alone, behind, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(one.abs().max()) + 1e-7)


def test_the_mask_shows_each_token_its_own_document_up_to_itself() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, -1]])
    seen = dense_mask(CausalDocuments(documents))[0, 0]
    for q in range(6):
        for k in range(6):
            assert bool(seen[q, k]) == (documents[0, q] == documents[0, k] and k <= q)
    assert not dense_mask(CausalDocuments(documents), window=1)[0, 0].logical_xor(torch.eye(6, dtype=torch.bool)).any()
    assert seen.any(-1).all(), "a row of the softmax is empty"


def test_a_model_that_carries_state_along_the_row_is_refused() -> None:
    config = MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="from one document to the next"):
        wrap_causal(model, "sdpa", StudentSettings(checkpoint_path="x"))


def test_a_head_that_does_more_than_a_head_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"], attn_implementation="sdpa")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 1.5)
    with pytest.raises(ValueError, match="more between hidden states and logits"):
        wrap_causal(model, "sdpa", StudentSettings(checkpoint_path="x"))


@pytest.mark.parametrize("path", ["", "/no/such/folder"])
def test_a_student_that_is_not_there_is_said_in_one_line(path: str) -> None:
    from student_trainer.students.load import student_from_model

    with pytest.raises(ValueError, match=r"student\.checkpoint_path") as caught:
        student_from_model(StudentSettings(checkpoint_path=path), torch.device("cpu"))
    assert "\n" not in str(caught.value)

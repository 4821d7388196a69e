"""Flex attention on a CPU, which inductor compiles for as for a GPU (forward passes alone), against the models' own;
and that nothing compiles it but packed rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from student_trainer.batch.view import CausalDocuments, OrderedDocuments
from student_trainer.rollouts.sampler import GenerateSampler
from student_trainer.settings import StudentSettings
from student_trainer.students import flex
from student_trainer.students.causal import wrap_causal
from student_trainer.students.student import Student
from tests.block_diffusion import noisy_beside_clean
from tests.unit.students.tiny import tiny_model

LENGTH = 200
GEMMA = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 50, "attn_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 1, "pad_token_id": None,
}  # fmt: skip
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model_of(implementation: str, gemma: bool = False) -> Any:
    if not gemma:
        return tiny_model("llama", attention=implementation)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**GEMMA), attn_implementation=implementation).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def student_of(implementation: str, kernel: str, gemma: bool = False) -> Student:
    student = wrap_causal(
        model_of(implementation, gemma), kernel, StudentSettings(checkpoint_path="x", compute="float32")
    )
    student.model.eval()
    return student


def rows(seed: int, length: int = LENGTH) -> tuple[Tensor, Tensor, CausalDocuments]:
    """Two rows of documents, the second with padding."""
    draw = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(97, (2, length), generator=draw)
    documents_BT = (torch.rand(2, length, generator=draw) < 0.02).cumsum(1).to(torch.int32)
    documents_BT[1, length * 3 // 4 :] = -1
    return tokens_BT, torch.arange(length).expand(2, -1), CausalDocuments(documents_BT)


@torch.no_grad()
def hidden(student: Student, batch: Any) -> Tensor:
    return student.body(*batch)


@needs_compiler
@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma2, cap and windows"])
def test_packed_rows_attend_as_with_the_models_own_attention_and_compile_once(gemma: bool) -> None:
    ours = student_of(flex.IMPLEMENTATION, "flex", gemma=gemma)
    theirs = model_of("eager", gemma)

    def expected(batch: Any) -> Tensor:
        """Eager attention adds its mask."""
        from student_trainer.students.attention_mask import dense_mask

        masks = {
            kind: torch.where(dense_mask(batch[2], window), 0.0, torch.finfo(torch.float32).min)
            for kind, window in {"full_attention": None, "sliding_attention": 50}.items()
        }
        out = theirs.model(
            input_ids=batch[0], position_ids=batch[1], use_cache=False,
            attention_mask=masks if gemma else masks["full_attention"],
        )  # fmt: skip
        return out.last_hidden_state

    with torch.no_grad():
        first, second = rows(1), rows(2)
        torch.testing.assert_close(hidden(ours, first), expected(first), rtol=1e-4, atol=1e-4)
        with torch.compiler.set_stance("fail_on_recompile"):
            found = hidden(ours, second)
        torch.testing.assert_close(found, expected(second), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_noisy_and_clean_halves_attend_as_with_the_dense_mask_and_compile_once() -> None:
    """A view of another kind than packed rows, in blocks: rows of twice the width, and ids of four kinds."""

    def halves(seed: int) -> tuple[Tensor, Tensor, OrderedDocuments]:
        tokens_BT, _, causal = rows(seed)
        documents_BT = causal.document_ids_BT
        new_BT = torch.cat([torch.ones(2, 1, dtype=torch.bool), documents_BT.diff(dim=1) != 0], 1)
        place_T = torch.arange(LENGTH)
        places_BT = place_T - torch.where(new_BT, place_T, 0).cummax(1).values
        attention = noisy_beside_clean(documents_BT.numpy(), places_BT.int().numpy(), 8)
        return torch.cat([tokens_BT.flip(1), tokens_BT], 1), places_BT.repeat(1, 2), attention

    ours, theirs = student_of(flex.IMPLEMENTATION, "flex"), student_of("sdpa", "sdpa")
    first, second = halves(1), halves(2)
    torch.testing.assert_close(hidden(ours, first), hidden(theirs, first), rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = hidden(ours, second)
    torch.testing.assert_close(found, hidden(theirs, second), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_query_and_key_in_float32_beside_a_value_in_bf16(autocast: bool) -> None:
    """What autocast leaves of a layer with rotary embeddings, where flex attention casts it itself, and where it, as
    torch before 2.13, does not: without autocast nobody else does.
    """
    from student_trainer.students.attention_mask import block_mask, dense_mask

    module = tiny_model("llama").model.layers[0].self_attn
    query, key, value = (torch.randn(2, heads, LENGTH, 16) for heads in (4, 2, 2))
    _, _, attention = rows(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = flex.attend(module, query, key, value.bfloat16(), block_mask(attention), scaling=0.25)
    exact, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, dense_mask(attention), scaling=0.25)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.05)


def test_neither_the_heads_check_nor_samples_nor_short_rows_compile() -> None:
    with torch.compiler.set_stance("fail_on_recompile"):
        ours = student_of(flex.IMPLEMENTATION, "flex")
        sampler, prompts = GenerateSampler(ours, (), 0), [np.arange(3, 9, dtype=np.int32), np.arange(5, dtype=np.int32)]
        samples = sampler.sample(prompts, None, new_tokens=6)
        short = hidden(ours, rows(4, length=40))
    plain = student_of("sdpa", "sdpa")
    expected = GenerateSampler(plain, (), 0).sample(prompts, None, new_tokens=6)
    assert [sample.ids_N.tolist() for sample in samples] == [sample.ids_N.tolist() for sample in expected]
    torch.testing.assert_close(short, hidden(plain, rows(4, length=40)))


@needs_compiler
@torch.no_grad()
def test_a_soft_cap_is_kept_where_sdpa_would_leave_it_out() -> None:
    ours = student_of(flex.IMPLEMENTATION, "flex", gemma=True)
    tokens_BT = torch.arange(30)[None]
    models = (ours.model, model_of("eager", gemma=True), model_of("sdpa", gemma=True))
    found, expected, uncapped = (model(tokens_BT, use_cache=False).logits for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - uncapped).abs().max() > 1e-3

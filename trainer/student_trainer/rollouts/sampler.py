"""Samples from the student: continuations of prompts, drawn from seeds. Used by `rollouts` and `evaluation.samples`.

`Sampler` is the interface; `GenerateSampler` runs transformers' own `generate` in this process, `block_sampler` has the
sampler of students that fill in blocks. A server that is given the student's weights could have the same interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from student_trainer.students.student import Student


@dataclass(frozen=True)
class Passes:
    """Forward passes that a sequence took, counted as if it were alone: `prefill` over given tokens, `denoising` to
    write tokens of a block, `commit` over a completed block, for those that follow.
    """

    prefill: int = 0
    denoising: int = 0
    commit: int = 0

    @property
    def writing(self) -> int:
        """All but the prefill: the passes of tokens per forward pass."""
        return self.denoising + self.commit


@dataclass(frozen=True, eq=False)
class Sample:
    """One continuation. `ended`: its last token is an end of text. `logprob`: the sum over its tokens, in nats, at
    temperature 1.

    For a student that writes several tokens at a time: `written_at_N`, at which of its writes each token was written,
    counted from 1, and the `passes` that it took.
    """

    ids_N: np.ndarray  # int32, at least one
    ended: bool
    logprob: float
    written_at_N: np.ndarray | None = None  # int32
    passes: Passes | None = None


class Sampler(Protocol):
    """Writes with the student's weights as they are at the time of the call."""

    def sample(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int] | None, *, new_tokens: int, temperature: float = 1.0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Sample]:  # fmt: skip
        """At most `new_tokens` tokens after each prompt of int32 ids, up to and including an end of text.

        What is drawn after a prompt depends only on its own seed; without seeds the likeliest token is taken.
        `meanwhile` is called now and then, and may raise to stop.
        """
        ...


class GenerateSampler:
    """transformers' `generate`, with its KV cache. `ends`: the tokens that end a text, if there are any. `at_once`:
    prompts per call, None for all.

    Only ids below `student.shared_vocab` are drawn: the teacher must be able to read them.
    """

    def __init__(self, student: Student, ends: Sequence[int], pad_id: int, at_once: int | None = None):
        self._student, self._ends, self._pad_id, self._at_once = student, sorted(set(ends)), pad_id, at_once

    def sample(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int] | None, *, new_tokens: int, temperature: float = 1.0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Sample]:  # fmt: skip
        samples: list[Sample] = []
        size = self._at_once or max(1, len(prompts))
        for first in range(0, len(prompts), size):
            uniforms_PN = None
            if seeds is not None:
                drawn = [np.random.default_rng(seed).random(new_tokens) for seed in seeds[first : first + size]]
                uniforms_PN = torch.from_numpy(np.stack(drawn))
            draw = _Draw(uniforms_PN, temperature, self._student.shared_vocab, meanwhile)
            samples += self._generate(prompts[first : first + size], draw, new_tokens)
        return samples

    def _generate(self, prompts: Sequence[np.ndarray], draw: _Draw, new_tokens: int) -> list[Sample]:
        width, device = max(len(ids_N) for ids_N in prompts), self._student.device
        tokens_PT = torch.full((len(prompts), width), self._pad_id, dtype=torch.int64)
        for row, ids_N in enumerate(prompts):
            tokens_PT[row, width - len(ids_N) :] = torch.from_numpy(ids_N.astype(np.int64))
        lengths_P = torch.tensor([len(ids_N) for ids_N in prompts])
        mask_PT = (torch.arange(width) >= width - lengths_P[:, None]).long()
        model: Any = self._student.model
        with writing(self._student):
            out_PT = model.generate(
                input_ids=tokens_PT.to(device), attention_mask=mask_PT.to(device),
                logits_processor=LogitsProcessorList([draw]),
                generation_config=GenerationConfig(
                    max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=self._ends or None,
                    pad_token_id=self._pad_id,
                ),
            )  # fmt: skip
        logprobs_PN = torch.stack(draw.logprobs, 1).cpu()
        return [self._cut(*pair) for pair in zip(out_PT[:, width:].cpu().numpy(), logprobs_PN.numpy(), strict=True)]

    def _cut(self, ids_N: np.ndarray, logprobs_N: np.ndarray) -> Sample:
        """A sample without what comes after the end."""
        ends = np.flatnonzero(np.isin(ids_N, self._ends))
        stop = int(ends[0]) + 1 if len(ends) else len(ids_N)
        return Sample(ids_N[:stop].astype(np.int32), len(ends) > 0, float(logprobs_N[:stop].sum()))


class _Draw(LogitsProcessor):
    """Chooses each row's next token and leaves `generate` no other choice. Inverse transform sampling, with one uniform
    number per token, so that a row's draws do not depend on the other rows.
    """

    def __init__(
        self, uniforms_PN: Tensor | None, temperature: float, vocab: int | None, meanwhile: Callable[[], None]
    ):
        self._uniforms_PN, self._temperature, self._vocab, self._meanwhile = uniforms_PN, temperature, vocab, meanwhile
        self.logprobs: list[Tensor] = []  # [P] per token

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._meanwhile()
        scores_PV: Tensor = scores[:, : self._vocab].float()
        if self._uniforms_PN is None:
            chosen_P = scores_PV.argmax(-1)
        else:
            uniform_P = self._uniforms_PN[:, len(self.logprobs)].to(scores_PV.device)
            mass_PV = torch.softmax(scores_PV.double() / self._temperature, -1).cumsum(-1)
            # u times the total, which by rounding may not be 1.
            chosen_P = torch.searchsorted(mass_PV, (uniform_P * mass_PV[:, -1])[:, None], right=True)[:, 0]
        self.logprobs.append(torch.log_softmax(scores_PV, -1).gather(1, chosen_P[:, None])[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_P[:, None], 0.0)


@contextmanager
def writing(student: Student) -> Iterator[None]:
    """A context with evaluation mode, no gradients, the student's compute dtype, and without a checkpoint's defaults
    for generation (a repetition penalty would change what the student writes).
    """
    model: Any = student.model
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with student.resting(), student.autocast():
            yield
    finally:
        model.generation_config = defaults


def ends_of_text(student: Student, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end what the student writes: the tokenizer's and the model's."""
    model: Any = student.model
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {*([own] if isinstance(own, int) else own or []), tokenizer.eos_token_id} - {None}
    return tuple(sorted(ends))

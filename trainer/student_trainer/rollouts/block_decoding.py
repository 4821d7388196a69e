"""How a block-diffusion student fills in masked tokens: block by block, several at a time. Used by `block_sampler` and
by `evaluation.infilling`.

    given tokens before the first masked block     one pass, keys and values are cached      (prefill)
    a block, as long as it has masked tokens       one pass; tokens with a probability above the threshold are written,
                                                   or else the likeliest one                 (denoising)
    a completed block, if another follows          one pass, keys and values are cached      (commit)

Blocks are counted from the first token of a sequence, as in training, and the student sees in a pass what its noisy
half sees: the current block, and the clean tokens before it. So masked tokens see the given tokens of their block, on
both sides. With family token_shift a block's first token is predicted by the last row of the pass before it; with block
size 1 that is autoregressive decoding, one pass per token.

A token's probability is that at temperature 1, among all ids that a text can contain. At temperature 0 the token is the
likeliest one, otherwise it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from student_trainer.rollouts.block_rows import BlockRows
from student_trainer.rollouts.sampler import Passes, writing
from student_trainer.students.causal import DecoderBody
from student_trainer.students.diffusion_record import DiffusionRecord, text_rows
from student_trainer.students.student import Student

# Rows whose logits exist at a time.
CHUNK_ROWS = 256


@dataclass(frozen=True, eq=False)
class Filled:
    """A sequence without masked tokens. `written_at_N`: at which of its writes each token was written, counted from 1;
    0 for given tokens. `logprob`: the sum over the written tokens, each when it was written, in nats at temperature 1.
    `ended`: its last token is an end of text, and what was to follow is left out.
    """

    ids_N: np.ndarray  # int32
    written_at_N: np.ndarray  # int32
    logprob: float
    ended: bool
    passes: Passes

    @property
    def tokens(self) -> int:
        """How many tokens were written."""
        return int((self.written_at_N > 0).sum())


@dataclass(frozen=True, eq=False)
class BlockDecoder:
    """`ends`: the tokens that end a text. `cached`: keep keys and values of finished blocks; otherwise each pass reads
    everything before the block again, with the same result.
    """

    student: Student
    record: DiffusionRecord
    ends: tuple[int, ...] = ()
    threshold: float = 0.9
    temperature: float = 0.0
    cached: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold: got {self.threshold}, expected a probability above 0 and at most 1")
        if self.temperature < 0.0:
            raise ValueError(f"temperature: got {self.temperature}, expected 0 (the likeliest token) or more")

    def fill_in(
        self, sequences: Sequence[np.ndarray], draws: Sequence[np.random.Generator] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Filled]:  # fmt: skip
        """The sequences, filled in side by side, with a token for every mask token. What is drawn in a sequence depends
        only on its own generator; at temperature 0 nothing is drawn. `meanwhile` is called before every pass.

        ValueError for a sequence whose first token is not given, since nothing before it can predict it, and for a
        temperature above 0 without generators.
        """
        if not sequences:
            return []
        if self.temperature > 0 and draws is None:
            raise ValueError(f"temperature is {self.temperature}, but no random generators to draw from are given")
        rows = BlockRows.of(sequences, self.record)
        with writing(self.student):
            return _Filling(self, rows, draws if self.temperature > 0 else None, meanwhile).run()


class _Filling:
    """One call of `fill_in` under way."""

    def __init__(
        self, decoder: BlockDecoder, rows: BlockRows, draws: Sequence[np.random.Generator] | None,
        meanwhile: Callable[[], None],
    ):  # fmt: skip
        self.decoder, self.rows, self.draws, self.meanwhile = decoder, rows, draws, meanwhile
        self.student, self.size = decoder.student, rows.size
        self.shift = decoder.record.family == "token_shift"
        self.cache: Any = DynamicCache() if decoder.cached else None
        count = len(rows.tokens_PC)
        self.written_at_PC = np.zeros(rows.tokens_PC.shape, np.int32)
        self.writes_P = np.zeros(count, np.int32)
        self.logprob_PC = np.zeros(rows.tokens_PC.shape)
        self.end_P = np.full(count, -1)  # the column of the text's end
        self.passes = [Passes() for _ in range(count)]
        vocab = self.student.shared_vocab or text_rows(self.student.config, self.student.vocab_size)
        self.vocab = min(vocab, self.student.vocab_size)

    def run(self) -> list[Filled]:
        rows, size = self.rows, self.size
        last_PD = None  # the last row of the pass before a block
        if rows.first:
            last_PD = self.forward(0, rows.first * size, clean=True, keep=True)[:, -1]
            self.count("prefill", rows.exists_PC[:, : rows.first * size].any(axis=1))
        blocks = rows.tokens_PC.shape[1] // size
        for block in range(rows.first, blocks):
            start, stop = block * size, (block + 1) * size
            # token_shift: a row predicts the next token, so the row before a block predicts the block's first one.
            if self.shift and last_PD is not None:
                at_PC = rows.masked_PC & (np.arange(rows.masked_PC.shape[1]) == start)
                self.write(at_PC, last_PD[torch.from_numpy(at_PC.any(axis=1)).to(last_PD.device)])
            # Every pass writes at least one token per sequence: there are at most as many passes as tokens in a block.
            while rows.masked_PC[:, start:stop].any():
                self.denoise(start, stop)
            # The completed block goes into the cache if any sequence continues; one that has ended has nothing masked.
            following_P = rows.masked_PC[:, stop:].any(axis=1)
            if not following_P.any():
                break
            last_PD = self.forward(start, stop, clean=True, keep=True)[:, -1]
            self.count("commit", following_P)
        return [self.filled(row) for row in range(len(rows.tokens_PC))]

    def denoise(self, start: int, stop: int) -> None:
        """One pass over a block, which writes the tokens that are likely enough."""
        masked_PS = self.rows.masked_PC[:, start:stop]
        hidden_PSD = self.forward(start, stop, clean=False, keep=False)
        self.count("denoising", masked_PS.any(axis=1))
        if self.shift:
            hidden_PSD = hidden_PSD.roll(1, 1)  # a block's first token was written before
        # For all sequences at once: those whose block is complete are read along and write nothing.
        at_PC = np.zeros_like(self.rows.masked_PC)
        at_PC[:, start:stop] = masked_PS
        self.write(at_PC, hidden_PSD[torch.from_numpy(masked_PS).to(hidden_PSD.device)])

    def forward(self, start: int, stop: int, clean: bool, keep: bool) -> Tensor:
        """Hidden states [P, stop - start, D] of these columns, read as `clean` or as a block with masked tokens."""
        self.meanwhile()
        student, rows, device = self.student, self.rows, self.student.device
        first = start if self.cache is not None else 0
        # Without a cache all columns from 0 on are read again, and those before `start` are dropped below.
        tokens_PQ = rows.tokens_PC[:, first:stop]
        sees_PQK = self.sees(first, stop, noisy_from=stop if clean else start)
        body = student.body
        assert isinstance(body, DecoderBody)
        hidden_PQD = body.extend(
            torch.from_numpy(tokens_PQ).to(device), torch.from_numpy(rows.places(first, stop)).to(device),
            torch.from_numpy(sees_PQK).to(device), self.cache,
        )  # fmt: skip
        if self.cache is not None and not keep:
            # A noisy block's keys and values are for this pass only: a negative length removes that many from the end.
            self.cache.crop(start - stop)
        return hidden_PQD[:, start - first :]

    def sees(self, first: int, stop: int, noisy_from: int) -> np.ndarray:
        """[P, Q, K] bool: which columns before `stop` those from `first` on see. Padding sees padding."""
        query_Q1, key_K = np.arange(first, stop)[:, None], np.arange(stop)
        # Block by block: a place sees its own block and all before it.
        sees_QK = key_K // self.size <= query_Q1 // self.size
        if self.decoder.record.clean_half == "causal":
            # Clean tokens see from left to right if they did so in training; a noisy block sees all of itself.
            sees_QK = np.where(query_Q1 < noisy_from, key_K <= query_Q1, sees_QK)
        exists_PK = self.rows.exists_PC[:, :stop]
        # Padding comes before the shorter sequences, in whole blocks that none of their tokens sees.
        same_PQK = exists_PK[:, first:, None] == exists_PK[:, None, :]
        own_QK = key_K == query_Q1
        return same_PQK & (sees_QK | (own_QK & ~exists_PK[:, first:, None]))

    def write(self, at_PC: np.ndarray, hidden_MD: Tensor) -> None:
        """Write tokens at some of the masked places `at_PC`, from the hidden rows that predict these, in the same
        order: in each sequence those that are likely enough, or else the likeliest.
        """
        row_M, column_M = np.nonzero(at_PC)
        if not len(row_M):
            return
        ids_M, logprob_M = self.choose(hidden_MD, self.uniforms(row_M, column_M))
        # Those above the threshold, or else the likeliest of the sequence.
        chosen_M = logprob_M > np.log(self.decoder.threshold)
        for row in np.unique(row_M):
            of_row = np.flatnonzero(row_M == row)
            if not chosen_M[of_row].any():
                chosen_M[of_row[np.argmax(logprob_M[of_row])]] = True
            self.writes_P[row] += 1
        row_W, column_W = row_M[chosen_M], column_M[chosen_M]
        self.rows.tokens_PC[row_W, column_W] = ids_M[chosen_M]
        self.rows.masked_PC[row_W, column_W] = False
        self.written_at_PC[row_W, column_W] = self.writes_P[row_W]
        self.logprob_PC[row_W, column_W] = logprob_M[chosen_M]
        for row in np.unique(row_W):
            self.look_for_end(int(row))

    def uniforms(self, row_M: np.ndarray, column_M: np.ndarray) -> np.ndarray | None:
        """One number per place, from the generator of its sequence, which draws for a whole block in any case."""
        if self.draws is None:
            return None
        drawn = {row: self.draws[row].random(self.size) for row in np.unique(row_M)}
        return np.array([drawn[row][column % self.size] for row, column in zip(row_M, column_M, strict=True)])

    def choose(self, hidden_MD: Tensor, uniform_M: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The token of each row, and its logprob at temperature 1."""
        ids, logprobs = [], []
        for first in range(0, len(hidden_MD), CHUNK_ROWS):
            chunk = slice(first, first + CHUNK_ROWS)
            z_MV = self.student.head.logits(hidden_MD[chunk])[:, : self.vocab]
            if self.decoder.record.mask_token_id < self.vocab:
                # The mask token is never written; its mass goes to the others.
                z_MV[:, self.decoder.record.mask_token_id] = -torch.inf
            if uniform_M is None:
                ids_M = z_MV.argmax(-1)
            else:
                # Inverse transform sampling: the first id at which the cumulative sum of p at T exceeds u.
                mass_MV = torch.softmax(z_MV.double() / self.decoder.temperature, -1).cumsum(-1)
                # u times the total, which by rounding may not be 1.
                uniform_M1 = torch.from_numpy(uniform_M[chunk]).to(mass_MV)[:, None] * mass_MV[:, -1:]
                ids_M = torch.searchsorted(mass_MV, uniform_M1, right=True)[:, 0].clamp_max(self.vocab - 1)
            ids.append(ids_M)
            logprobs.append(z_MV.gather(1, ids_M[:, None])[:, 0] - z_MV.logsumexp(-1))
        return torch.cat(ids).cpu().numpy(), torch.cat(logprobs).double().cpu().numpy()

    def look_for_end(self, row: int) -> None:
        """End the text at its first end-of-text token, once nothing before it is masked."""
        wrote_C = self.written_at_PC[row] > 0
        ends = np.flatnonzero(wrote_C & np.isin(self.rows.tokens_PC[row], self.decoder.ends))
        if len(ends) and not self.rows.masked_PC[row, : ends[0]].any():
            # Everything after the end is dropped, so none of it needs to be written.
            self.end_P[row] = ends[0]
            self.rows.masked_PC[row] = False

    def count(self, kind: str, took_P: Any) -> None:
        for row in np.flatnonzero(took_P):
            before = self.passes[row]
            self.passes[row] = replace(before, **{kind: getattr(before, kind) + 1})

    def filled(self, row: int) -> Filled:
        keep_C = self.rows.exists_PC[row].copy()
        ended = self.end_P[row] >= 0
        if ended:
            keep_C[self.end_P[row] + 1 :] = False
        return Filled(
            self.rows.tokens_PC[row, keep_C].astype(np.int32), self.written_at_PC[row, keep_C],
            float(self.logprob_PC[row, keep_C].sum()), bool(ended), self.passes[row],
        )  # fmt: skip

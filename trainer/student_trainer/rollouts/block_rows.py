"""Sequences side by side, aligned by blocks, as a block-diffusion student fills them in. Made and written into by
`block_decoding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from student_trainer.students.diffusion_record import DiffusionRecord


@dataclass(eq=False)
class BlockRows:
    """Sequences in columns, aligned so that their first masked blocks begin at the same column; before sequence p there
    are `pad_P` columns of padding, in whole blocks. On the CPU.
    """

    size: int
    first: int  # the first masked block
    pad_P: np.ndarray
    tokens_PC: np.ndarray  # int64
    exists_PC: np.ndarray  # bool
    masked_PC: np.ndarray  # bool

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray], record: DiffusionRecord) -> BlockRows:
        size, mask = record.block_size, record.mask_token_id
        for row, ids_N in enumerate(sequences):
            if not len(ids_N) or ids_N[0] == mask:
                raise ValueError(f"sequence {row}: its first token must be given, because the student predicts from it")
        # Filling in begins at the same column in all sequences: whole blocks of padding go before the shorter ones.
        blocks_P = np.array([_first(ids_N == mask) // size for ids_N in sequences])
        first = int(blocks_P.max())
        pad_P = (first - blocks_P) * size
        # Rounded up to whole blocks.
        width = max(-(-(len(ids_N) + pad) // size) * size for ids_N, pad in zip(sequences, pad_P, strict=True))
        tokens_PC = np.zeros((len(sequences), width), np.int64)
        exists_PC = np.zeros(tokens_PC.shape, bool)
        for row, (ids_N, pad) in enumerate(zip(sequences, pad_P, strict=True)):
            tokens_PC[row, pad : pad + len(ids_N)] = ids_N
            exists_PC[row, pad : pad + len(ids_N)] = True
        return cls(size, first, pad_P, tokens_PC, exists_PC, exists_PC & (tokens_PC == mask))

    def places(self, start: int, stop: int) -> np.ndarray:
        """[P, stop - start]: the columns' places in their sequences; 0 for padding."""
        # Places are counted from the start of each sequence.
        return np.maximum(np.arange(start, stop) - self.pad_P[:, None], 0)


def _first(at_N: np.ndarray) -> int:
    """The first place that is True; if none is, the last one: then all is read, and nothing written."""
    return int(at_N.argmax()) if at_N.any() else len(at_N) - 1

"""Sequences side by side as a block-diffusion student fills them in, their blocks in common columns. Made and written
into by `block_decoding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from student_trainer.students.diffusion_record import DiffusionRecord


@dataclass(eq=False)
class BlockRows:
    """Sequences in columns, so that the first masked block of each begins at the same one; `pad_P` columns of whole
    blocks stand before a shorter one. On the CPU.
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
                raise ValueError(f"sequence {row}: its first token must be given, a student predicts from it")
        # All sequences begin to be filled in at one column: whole blocks of padding go before the shorter ones.
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
        """[P, stop - start]: places in their sequences; 0 for padding."""
        # Positions count from each sequence's own beginning.
        return np.maximum(np.arange(start, stop) - self.pad_P[:, None], 0)


def _first(at_N: np.ndarray) -> int:
    """The first place that is True; the last one where none is: then all is read, and nothing written."""
    return int(at_N.argmax()) if at_N.any() else len(at_N) - 1

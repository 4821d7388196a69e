"""States that a block-diffusion student passed through as it wrote a text, to be learnt from. Called by `diffusion`.

On-policy training as OPDLM has it (arXiv 2606.06712): of every block one state of the student's own trajectory, each as
likely as the others, and the loss on all tokens that are still masked in it.
"""

from __future__ import annotations

import numpy as np


def left_to_write(
    written_at_T: np.ndarray, maskable_T: np.ndarray, blocks_T: np.ndarray, chance_T: np.ndarray
) -> np.ndarray:
    """[T] bool: which tokens of a row are masked in the state drawn for their block.

    `written_at_T`: at which write of its sequence a token was written, 0 for given ones. `blocks_T`: the block of each
    place, by number. `chance_T`: uniform numbers, of which the one at a block's first place draws its state. The state
    before a write has what that write and later ones wrote masked; a block has one for each write that it took.
    """
    masked_T = np.zeros(len(written_at_T), bool)
    written_T = maskable_T & (written_at_T > 0)
    for block in np.unique(blocks_T[written_T]):
        places = np.flatnonzero(blocks_T == block)
        writes = np.unique(written_at_T[places][written_T[places]])
        before = writes[int(chance_T[places[0]] * len(writes))]
        masked_T[places] = written_T[places] & (written_at_T[places] >= before)
    return masked_T

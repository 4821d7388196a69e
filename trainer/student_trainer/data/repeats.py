"""How often each document of a weighted source is read in an epoch, and in which order. Used by `random_access`.

A document of weight w is read w times an epoch on average: floor(w) times, and once more with the chance that is left,
by a hash of seed, epoch and document. So a document of weight 0 costs nothing, and no loss is rescaled. Nothing but the
weights is held: an epoch's order is computed, as that of other sources.
"""

import numpy as np

from student_trainer.data.order import hashed, key_of


class Repeats:
    """ValueError for weights that are negative, not finite or all 0."""

    def __init__(self, weights_N: np.ndarray, name: str, seed: int) -> None:
        if not np.isfinite(weights_N).all() or (weights_N < 0).any() or not (weights_N > 0).any():
            raise ValueError(
                f"source {name!r}: the documents' weights are from {weights_N.min()} to {weights_N.max()}; expected "
                "finite numbers of 0 or more, at least one above 0"
            )
        self._weights_N, self._name, self._seed = weights_N.astype(np.float64), name, seed
        self._of: tuple[int, np.ndarray] | None = None  # an epoch, and where each document's readings end in it

    def count(self, epoch: int) -> int:
        """How many documents are read in an epoch."""
        return int(self._ends(epoch)[-1])

    def documents(self, epoch: int, places_N: np.ndarray) -> np.ndarray:
        """The documents at these places of the epoch, which counts each as often as it is read."""
        return np.searchsorted(self._ends(epoch), places_N, side="right")

    def _ends(self, epoch: int) -> np.ndarray:
        if self._of is None or self._of[0] != epoch:
            whole_N = np.floor(self._weights_N)
            chance_N = hashed(len(whole_N), key_of(self._seed, self._name, epoch, "repeats"))
            times_N = (whole_N + (chance_N < self._weights_N - whole_N)).astype(np.int64)
            if not times_N.any():  # a source of few documents that chance has all left out
                times_N = (self._weights_N > 0).astype(np.int64)
            self._of = epoch, np.cumsum(times_N)
        return self._of[1]

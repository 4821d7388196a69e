"""What the trainer knows of an adapter. A file of this package each, listed in `load.ADAPTERS`.

An adapter changes a loaded, quantised model in place, before an architecture makes a student of it; what it adds are
parameters of the model, so checkpoints, ranks and optimizers need not know of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from student_trainer.settings import StudentSettings


class Adapter(ABC):
    """Called by `load` when a student is built, and by those who want a model without adapters again."""

    @abstractmethod
    def add(self, model: Any, settings: StudentSettings) -> None:
        """Freeze what is not to be trained, and add what is. It changes nothing of the model's function yet, or the
        less, the better. ValueError where the model has no place for it.
        """

    def merge(self, model: Any) -> Any:
        """The model with what was added put into its weights, in place, all of them trainable; one that was given
        nothing as it is. ValueError where that would change what the model computes.
        """
        return model.requires_grad_(True)

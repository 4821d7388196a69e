"""The trainer's interface to an adapter. Each is a file of this package, listed in `load.ADAPTERS`.

An adapter changes a loaded, perhaps quantised model in place, before an architecture makes a student of it; it adds
parameters to the model, so checkpoints, ranks and optimizers need not know about it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from student_trainer.settings import StudentSettings


class Adapter(ABC):
    """Called by `load` when a student is built, and when a model without adapters is needed again."""

    @abstractmethod
    def add(self, model: Any, settings: StudentSettings) -> None:
        """Freeze what is not to be trained, and add what is, with as little change of the model's function as possible,
        ideally none. ValueError if the model has no place for it.
        """

    def merge(self, model: Any) -> Any:
        """The model with the additions merged into its weights, in place, and all of them trainable; a model without
        additions as it is. ValueError if that would change what the model computes.
        """
        return model.requires_grad_(True)

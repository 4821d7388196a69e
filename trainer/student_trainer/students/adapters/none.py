"""No adapter: all weights are trained. One of `load.ADAPTERS`."""

from __future__ import annotations

from typing import Any

from student_trainer.settings import StudentSettings
from student_trainer.students.adapters.adapter import Adapter


class NoAdapter(Adapter):
    def add(self, model: Any, settings: StudentSettings) -> None:
        """The model as it is."""


NO_ADAPTER = NoAdapter()

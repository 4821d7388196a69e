"""How a loaded model becomes a student: a line for each architecture. Called by `load`.

An architecture says how the student reads a batch, and how the model computes hidden states of what it reads. It is
given the model after its weights have been loaded, converted and adapted, so it goes with every quantiser and adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from student_trainer.settings import StudentSettings
from student_trainer.students.causal import wrap_causal
from student_trainer.students.student import Student

# By `student.architecture`: (model on its device, "flex" or "sdpa", settings) to the student.
ARCHITECTURES: dict[str, Callable[[Any, str, StudentSettings], Student]] = {"causal": wrap_causal}

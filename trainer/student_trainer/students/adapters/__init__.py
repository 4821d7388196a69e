"""Adapters by name: what is trained in place of all of a student's weights, `student.adapter`. A new one is a file here
and a line below.

Imports settings and the students' layers. Read `adapter.py` first.
"""

from __future__ import annotations

from collections.abc import Mapping

from student_trainer.students.adapters.adapter import Adapter
from student_trainer.students.adapters.lora import LORA
from student_trainer.students.adapters.none import NONE

ADAPTERS: Mapping[str, Adapter] = {
    "none": NONE,
    "lora": LORA,
}

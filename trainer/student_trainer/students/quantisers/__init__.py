"""Quantisers of weights by name: `student.quantiser`. A new one is a file here and a line below.

Imports torch and nothing of the trainer. Read `quantiser.py` first.
"""

from __future__ import annotations

from collections.abc import Mapping

from student_trainer.students.quantisers.bitnet import BITNET
from student_trainer.students.quantisers.fairy2i import FAIRY2I
from student_trainer.students.quantisers.none import NONE
from student_trainer.students.quantisers.quantiser import Quantiser
from student_trainer.students.quantisers.rtn import RTN
from student_trainer.students.quantisers.seq2 import SEQ2

QUANTISERS: Mapping[str, Quantiser] = {
    "none": NONE,
    "bitnet": BITNET,
    "fairy2i": FAIRY2I,
    "seq2": SEQ2,
    "rtn": RTN,
}

"""The student's losses. May import settings and batch. Open `terms.py` first: it defines what a loss is.

`head_loss` computes all token losses from hidden states; `token_term` makes one from its settings; `teacher_rows` turns
a client's responses into `TeacherRows`, the teacher's targets row by row. They can be used in any training loop
(`pip install stillhouse[losses]`): besides the standard library they import torch, numpy and pydantic.
"""

from student_trainer.batch.head import Head
from student_trainer.batch.record_rows import teacher_rows
from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.losses.head import head_loss
from student_trainer.losses.kinds import token_term
from student_trainer.losses.terms import TeacherTerm, Term, TokenTerm
from student_trainer.losses.values import HeadLoss

__all__ = [
    "Head",
    "HeadLoss",
    "TeacherRows",
    "TeacherTerm",
    "Term",
    "TokenTerm",
    "head_loss",
    "teacher_rows",
    "token_term",
]

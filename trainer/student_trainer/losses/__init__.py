"""Losses of the student. May import settings and batch. Open `terms.py` first: what a loss is to all others.

`head_loss` computes all losses of tokens from hidden states; `token_term` makes one by its settings; `teacher_rows`
makes a client's answers into `TeacherRows`, which is what the teacher said, row by row. These are for anybody's loop
(`pip install stillhouse[losses]`): beside the standard library they import torch, numpy and pydantic.
"""

from student_trainer.batch.answer_rows import teacher_rows
from student_trainer.batch.head import Head
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

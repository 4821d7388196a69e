"""Losses of the student: `head_loss` computes them all from hidden states.

`Term` says what to compute, `TeacherRows` what the teacher said, row by row.
"""

from student_trainer.batch.teacher_rows import TeacherHead, TeacherRows
from student_trainer.losses.head import HeadLoss, head_loss
from student_trainer.losses.terms import Term

__all__ = ["HeadLoss", "TeacherHead", "TeacherRows", "Term", "head_loss"]

"""A batch on its way from the data to the losses: packed rows, and the teacher's rows beside them.

Imports settings and `teacher_proto` alone. Read `batch.py` first, then `align.py`.
"""

"""A batch on its way from the data to the losses: packed rows, a student's views, the teacher's rows.

Imports `teacher_proto` alone. Read `batch.py` first, then `view.py` and `align.py`.
"""

"""A batch on its way from the data to the losses: packed rows, a student's views, the teacher's rows.

May import settings and the modules next to `ranks.py`. Open `batch.py` first; then `view.py` and `align.py`.
"""

"""First values for a quantised student's low-rank corrections, out of data and without a gradient.

May import students and what lies below them. Open `calibrate.py` first.
"""

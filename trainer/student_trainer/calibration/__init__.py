"""First values for what quantisation adds to a student, out of data and without a gradient: SubLN's gains, and low-rank
corrections.

May import students and what lies below them. Open `calibrate.py` first.
"""

"""Initial values, from data and without gradients, for what quantisation adds to a student: SubLN's gains, and low-rank
corrections.

May import students and what lies below them. Open `calibrate.py` first.
"""

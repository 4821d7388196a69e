"""Held-out figures, and texts that the student continues, to be read.

Read `evaluator.py` first.
"""

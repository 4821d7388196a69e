"""Held-out figures, and texts that the student continues, to be read.

May import targets, rollouts and what lies below them. Open `evaluator.py` first.
"""

"""Held-out metrics, and sample texts that the student writes.

May import targets, rollouts and what lies below them. Open `evaluator.py` first.
"""

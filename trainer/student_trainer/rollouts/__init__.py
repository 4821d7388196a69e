"""Text that the student writes and then learns from: which batches, from which prompts, how it is sampled.

May import students and what lies below them. Open `rollouts.py` first.
"""

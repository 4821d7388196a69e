"""Text that the student writes and then learns from: in which batches, from which prompts, and how it is sampled.

May import students and what lies below them. Open `rollouts.py` first.
"""

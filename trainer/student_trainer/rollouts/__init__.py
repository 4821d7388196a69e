"""Text that the student writes and then learns from: which batches, from which prompts, how it is sampled.

Read `rollouts.py` first.
"""

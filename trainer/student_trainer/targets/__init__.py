"""Sources of a teacher's targets, and prefetching them ahead of the training step.

May import students and what lies below them, not rollouts. Open `protocol.py` first; then `prefetch.py`.
"""

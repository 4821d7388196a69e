"""Where a teacher's targets come from, and how they come ahead of time.

May import students and what lies below them, not rollouts. Open `protocol.py` first; then `prefetch.py`.
"""

"""Where a teacher's targets come from, and how they come ahead of time.

Read `protocol.py` first, then `prefetch.py`.
"""

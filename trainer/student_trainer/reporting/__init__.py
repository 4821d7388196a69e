"""Where metrics are written: files, progress lines, trackers, and a run's report page.

May import checkpoint, evaluation, optim and what lies below them. Open `logs.py` first.
"""

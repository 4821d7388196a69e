"""Where figures go: metrics files, progress lines, trackers, the page of a run.

May import checkpoint, evaluation, optim and what lies below them. Open `logs.py` first.
"""

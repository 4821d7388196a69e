"""Where figures go: metrics files, progress lines, trackers, the page of a run.

Read `logs.py` first.
"""

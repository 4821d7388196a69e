"""A run on disk: its folder, its checkpoints, their remote copies, and which settings a resumed run may change.

May import students and what lies below them. Open `checkpoints.py` first.
"""

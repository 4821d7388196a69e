"""A run on disk: its folder, its checkpoints, their copies elsewhere, and what a resumed run may change.

May import students and what lies below them. Open `checkpoints.py` first.
"""

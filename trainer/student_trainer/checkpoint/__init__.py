"""A run on disk: its folder, its checkpoints, their copies elsewhere, and what a resumed run may change.

Read `checkpoints.py` first.
"""

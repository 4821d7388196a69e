"""Adapters: what is trained instead of all of a student's weights, one file each. Listed in `load.ADAPTERS`.

May import settings and the students' layers. Open `adapter.py` first.
"""

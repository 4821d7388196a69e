"""What is trained in place of all of a student's weights, a file an adapter. Listed in `load.ADAPTERS`.

May import settings and the students' layers. Open `adapter.py` first.
"""

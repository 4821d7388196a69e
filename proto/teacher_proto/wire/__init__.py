"""Records <-> bytes: msgpack messages and JSON, tensors, checksums, limits. WIRE.md is the specification.

May import the records beside it (`targets`, `attention`, `requests`, `errors`). Open `records.py` first.
"""

"""Encodes and decodes records: msgpack messages and JSON, tensors, checksums, limits. WIRE.md is the specification.

May import the records (`targets`, `attention`, `requests`, `errors`). Open `records.py` first.
"""

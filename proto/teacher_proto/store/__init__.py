"""The target store: answers of teachers on a disk, found again by content, and as Parquet files.

May import `wire` and the records. Open `target_store.py` first.
"""

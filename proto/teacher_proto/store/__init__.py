"""The target store: teachers' targets on disk, looked up by content, and their export and import as Parquet files.

May import `wire` and the records. Open `target_store.py` first.
"""

"""Target datasets: a teacher's targets as immutable Parquet shards in a folder or a bucket. Open `dataset.py` first.

    URL/manifest-DIGEST.json           the teacher, the query and the codec (`manifest.py`)
    URL/shards/targets-DIGEST.parquet  targets, in the columns of `store/parquet.py` (`shards.py`)
    URL/index/NAME.idx                 document -> shard and row group, size and sha256 of each shard (`index.py`)

Any number of processes may add shards at the same time: names are derived from the contents, so no two processes write
different bytes under one name, and writes are atomic (`folder.py`). `stillhouse-teacher fill --output URL` writes a
dataset, the trainer's `teacher=cached teacher.store=URL` reads it. Needs pyarrow and fsspec, imported on demand.
"""

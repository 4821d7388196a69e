"""Target datasets: a teacher's answers as immutable Parquet shards in a folder or a bucket. Open `dataset.py` first.

    URL/manifest-DIGEST.json           whose answers they are, what was asked, how they are coded (`manifest.py`)
    URL/shards/targets-DIGEST.parquet  answers, in the columns of `store/parquet.py` (`shards.py`)
    URL/index/NAME.idx                 document -> shard and row group, size and sha256 of each shard (`index.py`)

Any number of processes add shards at the same time: names come from the contents, so no two write one object with
different bytes, and each object is there whole or not at all (`folder.py`). `stillhouse-teacher fill --output URL`
writes one, the trainer's `teacher=cached teacher.store=URL` reads it. Needs pyarrow and fsspec, imported on demand.
"""

"""s3:// and gs:// against real servers: runs that resume exactly, indexed and streamed; what is missing is named."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from student_trainer.data.mixture import MixtureState
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.unit.data.making import opened, run, same, texts
from tests.unit.data.stores import BUCKET, STORES

TEXTS = texts(300, longest=15)


@pytest.fixture(params=STORES, scope="module")
def store(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """The URL of a bucket with data in it, and the options to reach it."""
    with STORES[request.param]() as options:
        url = f"{request.param}://{BUCKET}"
        for part in range(3):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[part::3]).encode()
            with fsspec.open(f"{url}/lines/{part}.jsonl.gz", "wb", **options) as file:
                file.write(gzip.compress(lines))
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(pa.table({"text": TEXTS}), sink, row_group_size=50)
        with fsspec.open(f"{url}/table/x.parquet", "wb", **options) as file:
            file.write(sink.getvalue().to_pybytes())
        yield url, options


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["lines", "lines/*.gz", "table/x.parquet"])
def test_a_run_from_a_bucket_resumes_exactly(
    tmp_path: Path, store: tuple[str, dict[str, Any]], path: str, streaming: bool
) -> None:
    url, options = store
    kind = "parquet" if path.endswith("parquet") else "jsonl"
    shape = {"kind": kind, "path": f"{url}/{path}", "storage_options": options, "streaming": streaming}
    sources = {"far": SourceSettings(held_out_fraction=0.1, **shape)}
    settings = DataSettings(sources=sources, seq_len=128, rows=2, interleave=4, cache_folder=str(tmp_path))
    with opened(settings) as source:
        batches, states = run(source, 12)
        assert source.held_out("far")
    state = MixtureState.from_json(json.loads(json.dumps(states[7].to_json())))
    with opened(settings) as source:
        assert all(same(a, b) for a, b in zip(run(source, 5, state)[0], batches[7:], strict=True))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["lines/nothing.jsonl", "no/such/folder"])
def test_what_is_not_in_the_bucket_is_named(store: tuple[str, dict[str, Any]], path: str, streaming: bool) -> None:
    url, options = store
    source = SourceSettings(kind="jsonl", path=f"{url}/{path}", storage_options=options, streaming=streaming)
    settings = DataSettings(sources={"far": source})
    with pytest.raises(ValueError, match=f"{path}"), opened(settings):
        pass

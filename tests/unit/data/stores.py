"""Object stores to test against: real servers on the loopback that speak S3 and Google Cloud Storage."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any
from unittest import mock

import fsspec
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
from moto.server import ThreadedMotoServer

BUCKET = "barrels"
# gcsfs asks by gRPC what kind a bucket is, which no emulator answers, and waits a minute for it. Read at its import.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@contextmanager
def s3() -> Iterator[dict[str, Any]]:
    """A store at s3://barrels; yields the storage options that reach it. Keys come by the environment."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"endpoint_url": f"http://{host}:{port}"}
        with mock.patch.dict("os.environ", keys):
            fsspec.filesystem("s3", **options).makedirs(BUCKET, exist_ok=True)
            yield options
    finally:
        server.stop()


@contextmanager
def gcs() -> Iterator[dict[str, Any]]:
    """A store at gs://barrels; yields the storage options that reach it."""
    storage = Storage(use_memory_fs=True)
    create_bucket(BUCKET, storage)
    # The emulator's own server takes one connection at a time; clients hold several open.
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, storage))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "token": "anon"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


STORES = {"s3": s3, "gs": gcs}

"""Data sets from the Hugging Face hub, downloaded or streamed. Used by `random_access` and `streamed`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from student_trainer.data.files import DataFile
from student_trainer.settings.data import SourceSettings
from teacher_proto.process.stages import stage


def load_hub(name: str, settings: SourceSettings) -> datasets.Dataset:
    """The downloaded data set. ValueError if the hub does not answer or has no such data set."""
    with _loading(name, settings):
        return datasets.load_dataset(
            settings.name,
            settings.subset,
            split=settings.split,
            revision=settings.revision,
            storage_options=settings.storage_options or None,
        )


def stream_hub(name: str, settings: SourceSettings) -> tuple[datasets.IterableDataset, list[DataFile]]:
    """The data set as a stream, and the files that it is read from. ValueError as in `load_hub`.

    `told` of the hub's own files is their commit.
    """
    with _loading(name, settings):
        builder = datasets.load_dataset_builder(
            settings.name,
            settings.subset,
            revision=settings.revision,
            storage_options=settings.storage_options or None,
        )
        stream = builder.as_streaming_dataset(split=settings.split)
        by_split = builder.config.data_files or {}
        lists = [by_split[settings.split]] if settings.split in by_split else list(by_split.values())
        return stream, [_data_file(url, told) for files in lists for url, told in _told(files)]


def _told(files: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from zip(files, files.origin_metadata, strict=True)


def _data_file(url: str, told: tuple[str, ...]) -> DataFile:
    if "://" not in url:
        return DataFile(f"file://{url}", Path(url).stat().st_size, "")
    return DataFile(url, 0, "", ":".join(told) or None)


@contextmanager
def _loading(name: str, settings: SourceSettings) -> Iterator[None]:
    try:
        with stage(f"loading data set {settings.name} from the hub"):
            yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source {name!r}: cannot load {settings.name!r} (subset {settings.subset!r}, split {settings.split!r}, "
            f"revision {settings.revision!r}): {type(error).__name__}: {error}"
        ) from error

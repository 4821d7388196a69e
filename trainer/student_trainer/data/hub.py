"""Data sets by name from the Hugging Face hub, downloaded or streamed. Used by `random_access` and `streamed`."""

from typing import Any

import datasets

from student_trainer.data.settings import SourceSettings


def load_hub(name: str, settings: SourceSettings, streaming: bool) -> Any:
    """A `Dataset` or `IterableDataset`. ValueError where the hub does not answer or has no such data set."""
    try:
        return datasets.load_dataset(
            settings.name,
            settings.subset,
            split=settings.split,
            revision=settings.revision,
            streaming=streaming,
            storage_options=settings.storage_options or None,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source {name!r}: cannot load {settings.name!r} (subset {settings.subset!r}, split {settings.split!r}, "
            f"revision {settings.revision!r}): {type(error).__name__}: {error}"
        ) from error

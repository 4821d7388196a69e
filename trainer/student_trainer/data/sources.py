"""Opens the source that its settings describe. Called by `loader`, once a source."""

from student_trainer.data.documents import Source
from student_trainer.data.random_access import OPENERS, RandomAccessSource
from student_trainer.data.streamed import StreamedSource, open_shards
from student_trainer.settings.data import SourceSettings


def open_source(name: str, settings: SourceSettings, seed: int, cache_folder: str | None) -> Source:
    """ValueError for whatever is missing, empty or not what the settings say."""
    if settings.streaming:
        shards, content = open_shards(name, settings, cache_folder)
        return StreamedSource(name, settings, shards, content, seed)
    return RandomAccessSource(name, settings, OPENERS[settings.kind](name, settings, cache_folder), seed, cache_folder)

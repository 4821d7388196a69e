"""Short English texts with human ratings, for sources of kind package: film and product reviews, editorials, tweets.

They are in the source archive of vaderSentiment 0.5 (MIT; Hutto and Gilbert, ICWSM 2014), which `sdist` fetches. Opened
by `random_access`. `movie_reviews` has classes, the others are plain text.

A text's split is decided by a hash of its words, because the file's order reveals the class.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import datasets

from student_trainer.data.sdist import SENTIMENT, fetch

INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
RATED = 0.5  # texts with a mean rating closer to zero have no class
# The ten buckets of each split: a fifth for the final accuracy, a tenth for choices, the rest for training.
SPLITS: dict[str, range] = {
    "train": range(3, 10),
    "validation": range(2, 3),
    "test": range(2),
    "all": range(10),
}


@dataclass(frozen=True)
class Text:
    """One text. `rating`: the mean rating of 15 to 29 people, from -4 to 4."""

    id: str
    rating: float
    text: str


@dataclass(frozen=True)
class Collection:
    """`whole`: the sentences of a review or editorial are joined to one document, so that splits don't share any."""

    file: str
    whole: bool = False
    classes: bool = False


COLLECTIONS: dict[str, Collection] = {
    "movie_reviews": Collection("movieReviewSnippets_GroundTruth.txt", classes=True),
    "movies": Collection("movieReviewSnippets_GroundTruth.txt"),
    "amazon": Collection("amazonReviewSnippets_GroundTruth.txt", whole=True),
    "nyt": Collection("nytEditorialSnippets_GroundTruth.txt", whole=True),
    "tweets": Collection("tweets_GroundTruth.txt"),
}


def open_collection(name: str, split: str) -> datasets.Dataset:
    """The documents of a collection: `text`, and also `label`, `rating` and `id` if it has classes. ValueError for an
    unknown name or split, or if the archive can't be fetched.
    """
    if name not in COLLECTIONS:
        raise ValueError(f"kind package has no {name!r}, it has {', '.join(COLLECTIONS)}")
    if split not in SPLITS:
        raise ValueError(f"{name} has no split {split!r}, it has {', '.join(SPLITS)}")
    texts = list(of_split(documents(name), split))
    columns: dict[str, list[str] | list[float]] = {"text": [text.text for text in texts]}
    if COLLECTIONS[name].classes:
        columns |= {
            "label": ["positive" if text.rating > 0 else "negative" for text in texts],
            "rating": [text.rating for text in texts],
            "id": [text.id for text in texts],
        }
    return datasets.Dataset.from_dict(columns)


def documents(name: str) -> Iterator[Text]:
    """All documents of a collection, in the file's order."""
    collection = COLLECTIONS[name]
    texts: Iterable[Text] = parse(read_member(collection.file))
    if collection.whole:
        texts = (_joined(key, group) for key, group in itertools.groupby(texts, lambda text: text.id.split("_")[0]))
    return (text for text in texts if not collection.classes or abs(text.rating) >= RATED)


def of_split(texts: Iterable[Text], split: str) -> Iterator[Text]:
    """The texts of a split, without those that repeat the words of an earlier text."""
    seen = set()
    for text in texts:
        words = normalised(text.text)
        if words not in seen and bucket(words) in SPLITS[split]:
            yield text
        seen.add(words)


def parse(data: bytes) -> Iterator[Text]:
    """Parse tab-separated lines of id, mean rating and text. HTML entities are left as they are."""
    for line in data.decode("utf-8").split("\r\n"):
        if line.strip():
            key, rating, text = line.split("\t", 2)
            yield Text(key, float(rating), text.strip())


def normalised(text: str) -> str:
    """A text's letters and digits in lower case, with single spaces."""
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return " ".join(re.sub("[^a-z0-9 ]", "", plain).split())


def bucket(words: str) -> int:
    """A bucket from 0 to 9, by hash."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % 10


def read_member(file: str) -> bytes:
    """Read a file from the archive inside the package's archive. Nothing is unpacked to disk."""
    with zipfile.ZipFile(fetch(SENTIMENT)) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(INNER))) as inner:
        member = inner.extractfile(f"hutto_ICWSM_2014/{file}")
        assert member is not None, "the archive's hash was right"
        return member.read()


def _joined(key: str, sentences: Iterable[Text]) -> Text:
    group = list(sentences)
    rating = sum(sentence.rating for sentence in group) / len(group)
    return Text(key, rating, " ".join(sentence.text for sentence in group))

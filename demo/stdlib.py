"""Two small corpora that every Python has: prose and code of the standard library, as JSON lines. Called by `prepare`.

prose: the topics of the language reference (`pydoc_data.topics`), one document each. code: the modules of the standard
library, one document each, without tests.
"""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "pydoc_data"}


def write_stdlib(folder: Path) -> dict[str, Path]:
    """Write `prose.jsonl` and `code.jsonl` under `folder` (created if missing) and return their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, documents in (("prose", prose()), ("code", code())):
        written[name] = folder / f"{name}.jsonl"
        lines = (json.dumps({"id": key, "text": text}, ensure_ascii=False) for key, text in documents)
        written[name].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return written


def prose() -> Iterator[tuple[str, str]]:
    """(topic, text) of the language reference."""
    for topic in sorted(topics):
        yield topic, topics[topic].strip()


def code() -> Iterator[tuple[str, str]]:
    """(path within the library, source) of each module in UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if LEFT_OUT.isdisjoint(inner.parts):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a handful declare another encoding
            if text.strip():
                yield inner.as_posix(), text

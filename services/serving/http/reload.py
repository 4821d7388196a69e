"""Files that take effect when they are replaced: certificates and keys. Run beside the server by `process.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

log = structlog.get_logger("stillhouse.reload")
_LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class Watched:
    """`load` is called when one of `paths` has changed; with ValueError it keeps what it had."""

    name: str
    paths: Sequence[Path]
    load: Callable[[], None]


async def keep_loaded(watched: Sequence[Watched]) -> None:
    """Look at the files every two seconds, for ever."""
    seen = [_stamps(one.paths) for one in watched]
    while watched:
        await asyncio.sleep(_LOOK_EVERY_S)
        for i, one in enumerate(watched):
            if (now := _stamps(one.paths)) == seen[i]:
                continue
            seen[i] = now
            try:
                one.load()
                log.info("reloaded", what=one.name)
            except ValueError as error:
                log.error("not reloaded, the old one stays", what=one.name, reason=str(error))


def _stamps(paths: Sequence[Path]) -> list[tuple[int, ...] | None]:
    stamps: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            stat = path.stat()
            stamps.append((stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_ctime_ns))
        except OSError:
            stamps.append(None)
    return stamps

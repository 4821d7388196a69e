"""The codes that the trainer ends with: whoever started it knows whether to start it again. Used by `main` and `loop`.

    0   done
    1   an error; a later start may do better: a full disk, a process killed beside it, a mistake of ours
    2   can't run what was asked, and asking again won't help: a setting, data or a teacher must change first
    75  nothing is wrong with the run, start it again: stopped by a signal and saved; or whom it needs is away, the
        teacher, or the store or hub that its data or models come from

deploy/kubernetes/trainer.yaml gives up on 2 alone and does not count 75.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from teacher_proto.errors import DeadlyRequestError, RequestError, StillhouseError, VersionError

DONE, FAILED, USAGE, AGAIN = 0, 1, 2, 75

# What must change on our side; a request that ends engines is not to be asked again at all.
_OURS = (RequestError, VersionError, DeadlyRequestError)
# Classes that mean nobody could be reached, by package and name: their packages may not be installed. Each covers its
# subclasses.
_NETWORK = {
    "aiohttp.ClientConnectionError",
    "botocore.ConnectionError",
    "botocore.HTTPClientError",
    "httpx.TransportError",
    "httpx2.TransportError",
    "requests.ConnectionError",
    "requests.Timeout",
    "socket.gaierror",
    "urllib3.HTTPError",
}
# ConnectionErrors that are none: a reader of ours is gone; the hub was switched off; another rank of the run failed.
_OTHERWISE = {"builtins.BrokenPipeError", "huggingface_hub.OfflineModeIsEnabled", "student_trainer.RankError"}
_UNREACHED = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESTALE}
_BUSY = {408, 425, 429, 500, 502, 503, 504}


def code_of(error: BaseException) -> int:
    """The exit code for what ended a command. Errors are wrapped on their way up, so their causes are looked at too."""
    if isinstance(error, StillhouseError):
        if error.retryable:
            return AGAIN
        return USAGE if isinstance(error, _OURS) else FAILED
    if isinstance(error, (ValueError, OSError)) and any(_is_away(link) for link in _chain(error)):
        return AGAIN
    return USAGE if isinstance(error, ValueError) else FAILED


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on; `from None` hides a cause from readers alone."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _is_away(error: BaseException) -> bool:
    """Whether somebody could not be reached, or said that it is busy."""
    if isinstance(error, StillhouseError):
        return error.retryable
    names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}
    if names & _OTHERWISE:
        return False
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
    if isinstance(error, (ConnectionError, TimeoutError)) or names & _NETWORK:
        return True
    return status in _BUSY or getattr(error, "errno", None) in _UNREACHED

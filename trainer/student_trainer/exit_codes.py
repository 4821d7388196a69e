"""The trainer's exit codes, which say whether to start it again. Used by `main` and `loop`.

    0   done
    1   an error that may not recur: a full disk, another process of the run killed, a bug of ours
    2   cannot run, and starting it again will not help: a setting, the data or the teacher must change first
    75  nothing is wrong with the run, start it again: it was stopped by a signal and has saved its state, or a service
        is unavailable: the teacher, or the store or hub that its data or models come from

deploy/kubernetes/trainer.yaml fails the job only on 2, and does not count 75 as a failure.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from teacher_proto.errors import DeadlyRequestError, RequestError, StillhouseError, VersionError

DONE, FAILED, USAGE, AGAIN = 0, 1, 2, 75

# Errors that need a change on our side. A request that kills engines must not be repeated at all.
_OURS = (RequestError, VersionError, DeadlyRequestError)
# Errors of an unreachable peer, by package and class name, since the packages may not be installed. Each includes its
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
# ConnectionErrors of other kinds: the reader of our output is gone, the hub is switched off, another rank failed.
_OTHERWISE = {"builtins.BrokenPipeError", "huggingface_hub.OfflineModeIsEnabled", "student_trainer.RankError"}
_UNREACHED = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESTALE}
_BUSY = {408, 425, 429, 500, 502, 503, 504}


def code_of(error: BaseException) -> int:
    """The exit code for the error that ended a command. Errors get wrapped, so their causes are examined too."""
    if isinstance(error, StillhouseError):
        if error.retryable:
            return AGAIN
        return USAGE if isinstance(error, _OURS) else FAILED
    if isinstance(error, (ValueError, OSError)) and any(_is_away(link) for link in _chain(error)):
        return AGAIN
    return USAGE if isinstance(error, ValueError) else FAILED


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, and so on; after `from None` the cause is still in `__context__`."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _is_away(error: BaseException) -> bool:
    """Whether a peer could not be reached, or reported that it is busy."""
    if isinstance(error, StillhouseError):
        return error.retryable
    names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}
    if names & _OTHERWISE:
        return False
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
    if isinstance(error, (ConnectionError, TimeoutError)) or names & _NETWORK:
        return True
    return status in _BUSY or getattr(error, "errno", None) in _UNREACHED

"""`python -m serving.health_check`: exits with 0 if the service in this container is ready and requires keys.

It connects to the container's own address, as clients do, not to loopback. With `--open`, the service may accept
requests without a key. Run by docker-compose.yml; on failure, one line on stderr says what is wrong.
"""

from __future__ import annotations

import argparse
import socket
import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 8.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.health_check")
    parser.add_argument("--host", default=None, help="address to connect to; this machine's own if not given")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--open", action="store_true", help="the service may accept requests without a key")
    options = parser.parse_args(arguments)
    try:
        host = options.host or socket.gethostbyname(socket.gethostname())
        fault = find_fault(f"http://{host}:{options.port}", options.open)
    except OSError as error:
        fault = f"{options.host or socket.gethostname()}:{options.port} cannot be reached: {error}"
    if fault is not None:
        print(f"health_check: {fault}", file=sys.stderr)
    return 0 if fault is None else 1


def find_fault(url: str, is_open: bool) -> str | None:
    """What is wrong, or None. OSError if the service can't be reached."""
    status, body = _ask(f"{url}/health/ready")
    if status != 200:
        return f"not ready: {body}"
    status, _ = _ask(f"{url}/v1/teacher")
    if not is_open and status != 401:
        return f"it responded {status} to a request without a key, expected 401: it did not get its keys file"
    return None


def _ask(url: str) -> tuple[int, str]:
    # Connect directly: a proxy from the environment would check something else.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.read(500).decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Searches an image for secrets: its variables, its history, and all files of all layers, deleted ones included.

    deploy/scan_image.py IMAGE [IMAGE ...]

Prints what it finds; exit code 1 if there is anything, 2 if there is no such image. Needs only Docker and Python.
Packages from an index are skipped (see `NOT_OURS`), since their examples and test data are public.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

DOCKER = os.environ.get("DOCKER", "docker")
SECRETS = {
    "a private key": rb"-----BEGIN (?:RSA |EC |DSA |OPENSSH |ENCRYPTED )?PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}",
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{34}\b",
    "an AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": rb"\b(?:ghp|gho|ghs|ghu)_[A-Za-z0-9]{36}\b|\bgithub_pat_[A-Za-z0-9_]{60,}\b",
    "a password in a URL": rb"\bhttps?://[^\s/:@'\"<>{}$%]{2,40}:[^\s/:@'\"<>{}$%*]{4,80}@[a-z0-9.-]+\.[a-z]{2,}",
}
PATTERNS = {what: re.compile(pattern) for what, pattern in SECRETS.items()}
NAMES = re.compile(
    r"(^|/)(\.env|\.netrc|\.pypirc|id_(rsa|ed25519|ecdsa)|credentials|\.git-credentials)$|^run/secrets/."
)
# Public anyway: files of the distribution, and packages from an index, except for the URL that they came from.
NOT_OURS = re.compile(
    r"^usr/(share|lib)/|/site-packages/(?!(teacher_proto|serving|teacher_service|attention_service|student_trainer)/"
    r"|[^/]+\.dist-info/direct_url\.json)"
)
VARIABLE = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)\w*=\S{8,}")
LARGEST = 8 * 2**20  # larger files are not read: keys are small, weights are not


def scan(image: str) -> list[str]:
    """What looks like a secret in the image, one line for each. ValueError if there is no such image."""
    inspected = subprocess.run([DOCKER, "image", "inspect", image], capture_output=True, text=True)
    if inspected.returncode != 0:
        raise ValueError(f"no image {image} on this machine: {inspected.stderr.strip()}")
    config = json.loads(inspected.stdout)[0]["Config"]
    history = subprocess.run(
        [DOCKER, "history", "--no-trunc", "--format", "{{.CreatedBy}}", image],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = [f"variable {text.split('=')[0]}" for text in config.get("Env") or [] if VARIABLE.search(text)]
    found += [f"a command in its history sets {match[0].split('=')[0]}" for match in VARIABLE.finditer(history)]
    with subprocess.Popen([DOCKER, "save", image], stdout=subprocess.PIPE) as saving:
        assert saving.stdout is not None
        with tarfile.open(fileobj=saving.stdout, mode="r|") as layers:
            for layer in layers:
                stream = layers.extractfile(layer) if layer.isfile() else None
                if stream is not None and (layer.name.endswith("layer.tar") or layer.name.startswith("blobs/")):
                    found += in_layer(stream)
    return found


def in_layer(stream: IO[bytes]) -> Iterator[str]:
    """Findings in one layer; none for a blob that is not a layer, such as a manifest."""
    try:
        with tarfile.open(fileobj=stream, mode="r|") as layer:
            for member in layer:
                name = str(PurePosixPath(member.name))
                if not member.isfile() or member.size == 0 or NOT_OURS.search(name):
                    continue
                if NAMES.search(name):
                    yield f"{name}: its name suggests that it holds secrets"
                file = layer.extractfile(member)
                if file is None or member.size > LARGEST:
                    continue
                content = file.read()
                yield from (f"{name}: {what}" for what, pattern in PATTERNS.items() if pattern.search(content))
    except tarfile.ReadError:
        return


def main(images: list[str]) -> int:
    if not images or images[0].startswith("-"):
        print(__doc__)
        return 2
    found = 0
    for image in images:
        try:
            lines = scan(image)
        except ValueError as error:
            print(f"scan_image: {error}", file=sys.stderr)
            return 2
        found += len(lines)
        print("\n".join(f"{image}: {line}" for line in lines) or f"{image}: nothing that looks like a secret")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A reader who types what a page says: a folder like a fresh clone, the commands on PATH, the demo's teacher served.

Used by `test_documentation.py`. What differs from a reader's machine is all here: settings that make a training run
tiny are added at the end of `stillhouse-train`'s, the hub is a cache with the demo's two models, ports are free ones.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.docs.markdown import ROOT, Block
from tests.teacher_process import free_port

TINY = "run.steps=2 run.threads=1 data.seq_len=64 data.rows=2 data.held_out_rows=2"
DEMO = ROOT / ".cache/demo"
# What the names in the pages are here: the demo's own two models.
HUB = {"HuggingFaceTB/SmolLM2-135M-Instruct": DEMO / "teacher", "HuggingFaceTB/SmolLM2-135M": DEMO / "student"}
# What a fresh clone has not, and what a page may write.
OWN = (".git", ".env", "runs", "outputs", "site", "wandb")
READY = re.compile(r"stillhouse-\w+: ready at ")
PORT = re.compile(r"(localhost:|127\.0\.0\.1:|gpu-box:|--port )(80\d\d)\b")
BLOCK_TIMEOUT_S, READY_WITHIN_S = 240.0, 120.0
SHIM = """#!/bin/sh
# Settings of a run are followed by those that make it tiny; other commands are left alone.
case "$1" in check|sequences|*=*) exec {command} "$@" $DOCS_TINY ;; *) exec {command} "$@" ;; esac
"""


class Reader:
    """One page's reader. `ports` maps the ports in the page to those that are used; use it in a `with`."""

    def __init__(self, folder: Path, ports: dict[str, int]):
        self.folder, self._ports = folder, dict(ports)
        self._served: list[subprocess.Popen[str]] = []
        self._python = ""
        self._environment = _prepare(folder)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._served:
            os.killpg(process.pid, signal.SIGTERM)
        for process in self._served:
            process.communicate(timeout=60)

    def execute(self, block: Block) -> None:
        """Do what the block says. AssertionError if it fails, or prints other than the page tells."""
        environment = self._environment | {"DOCS_TINY": "" if "as-written" in block.marks else TINY}
        if "serves" in block.marks:
            self._serve(self._command(block), environment, block.where)
            return
        done = subprocess.run(
            self._command(block), cwd=self.folder, env=environment, text=True, timeout=BLOCK_TIMEOUT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        told = f"{block.where}\n{block.text}\n{done.stdout}"
        assert (done.returncode != 0) == ("fails" in block.marks), f"exit code {done.returncode}: {told}"
        if block.prints is not None:
            assert missing(block.prints, done.stdout) is None, (
                f"not printed: {missing(block.prints, done.stdout)!r} by {told}"
            )

    def _command(self, block: Block) -> list[str]:
        text = PORT.sub(self._here, block.text)
        if block.language == "python":
            text = self._python + text if "continues" in block.marks else text
            self._python = text
            return [sys.executable, "-c", text]
        return ["bash", "-euo", "pipefail", "-c", text]

    def _here(self, match: re.Match[str]) -> str:
        """The page's host and port as they are on this machine."""
        host, told = match.groups()
        if told not in self._ports:
            self._ports[told] = free_port()
        return f"{host.replace('gpu-box', 'localhost')}{self._ports[told]}"

    def _serve(self, command: list[str], environment: dict[str, str], where: str) -> None:
        """Start what goes on until the page's end, and wait until it says that it is ready."""
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._served.append(process)
        assert process.stdout is not None
        printed: list[str] = []
        impatience = threading.Timer(READY_WITHIN_S, process.kill)
        impatience.start()
        for line in process.stdout:
            printed.append(line)
            if READY.match(line):
                break
        impatience.cancel()
        assert printed and READY.match(printed[-1]), f"{where} was not ready:\n{''.join(printed)}"
        # Nobody reads on: a full pipe would stop it.
        threading.Thread(target=process.stdout.read, daemon=True).start()


def missing(told: str, printed: str) -> str | None:
    """The first line of `told` that is not in `printed` after the ones before it; `…` stands for anything."""
    lines = iter(printed.splitlines())
    for line in told.splitlines():
        pattern = re.compile(".*".join(re.escape(part) for part in line.strip().split("…")))
        if line.strip("… ") and not any(pattern.search(candidate) for candidate in lines):
            return line
    return None


def _prepare(folder: Path) -> dict[str, str]:
    """Fill the folder; the environment of everything that is executed there."""
    for entry in ROOT.iterdir():
        if entry.name not in OWN:
            (folder / entry.name).symlink_to(entry)
    _write_corpus(folder)
    binaries = folder / ".reader/bin"
    binaries.mkdir(parents=True)
    shim = binaries / "stillhouse-train"
    shim.write_text(SHIM.format(command=Path(sys.executable).with_name("stillhouse-train")))
    shim.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("STILLHOUSE_", "WANDB_"))}
    return inherited | {
        "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_CACHE": str(_hub(folder / ".reader/hub")),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / ".reader/datasets"),
        "OMP_NUM_THREADS": "1",
        # Ready in seconds, where vLLM takes half a minute; tests/e2e/test_demo.py has vLLM.
        "STILLHOUSE_ENGINE": "hf",
    }


def _write_corpus(folder: Path) -> None:
    """`corpus/*.txt` and `corpus.jsonl`: 300 and 100 pieces of the demo's prose, of a page each."""
    documents = [json.loads(line)["text"] for line in (DEMO / "text/prose.jsonl").read_text().splitlines()]
    pieces = [text[start : start + 1500] for text in documents for start in range(0, len(text), 1500)][:300]
    (folder / "corpus").mkdir()
    for number, text in enumerate(pieces):
        (folder / "corpus" / f"{number:03d}.txt").write_text(text)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in pieces[:100]))


def _hub(cache: Path) -> Path:
    commit = "0" * 40
    for name, model in HUB.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(commit)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / commit).symlink_to(model)
    return cache

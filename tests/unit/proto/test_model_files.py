"""A teacher's identity out of its folder: what is hashed, what changes it, what the cache may answer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from teacher_proto import model_files as module
from teacher_proto.identity import NumericIdentity, TeacherIdentity, compare_fingerprints
from teacher_proto.model_files import find_model, hash_files, identify

NUMERIC = NumericIdentity(engine="e", engine_version="1", device="cpu", parallel="1", attention_backend="sdpa")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stillhouse" / "sha256.json"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def identity(path: Path, **changes: object) -> TeacherIdentity:
    found = find_model(str(path))
    facts = {"dtype": "float32", "quantization": None, "vocab_size": 512, "numeric": NUMERIC} | changes
    return identify(found, hash_files(found.weight_files), **facts)  # type: ignore[arg-type]


def test_equal_folders_are_one_teacher_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "model"))
    assert identity(folder).fingerprint == identity(copy).fingerprint


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))


def add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<still>"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "semantic.weights.model.safetensors"),
        (edit_config, "semantic.config_sha256"),
        (add_token, "semantic.tokenizer_sha256"),
        (lambda folder: (folder / "hf_quant_config.json").write_text("{}"), "semantic.options.hf_quant_config.json"),
        (lambda folder: (folder / "quantize_config.json").write_text("{}"), "semantic.options.quantize_config.json"),
        (lambda folder: (folder / "quant_config.json").write_text("{}"), "semantic.options.quant_config.json"),
        (lambda folder: shutil.copy(folder / "model.safetensors", folder / "more.safetensors"),
         "semantic.weights.more.safetensors"),
    ],
)  # fmt: skip
def test_each_change_of_meaning_is_named(folder: Path, change: Callable[[Path], object], field: str) -> None:
    before = identity(folder)
    change(folder)
    after = identity(folder)
    assert [line.partition(":")[0] for line in before.difference(after)] == [field]
    assert compare_fingerprints(before.fingerprint, after.fingerprint) == "semantic"


def test_a_file_that_config_json_overrides_is_none_of_the_teacher(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    before = identity(folder)
    (folder / "quantize_config.json").write_text("{}")
    assert identity(folder).fingerprint == before.fingerprint


def test_hashes_are_the_files_and_come_from_the_cache_while_they_stay(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = folder / "model.safetensors"
    truth = hashlib.sha256(weights.read_bytes()).hexdigest()
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(module, "file_sha256", counting)
    monkeypatch.setattr(module, "_SETTLED_NS", 0)  # a file of this very moment is not kept otherwise
    assert hash_files([weights]) == {"model.safetensors": truth} and len(hashed) == 1
    assert hash_files([weights]) == {"model.safetensors": truth} and len(hashed) == 1
    os.utime(weights, (1, 1))
    assert hash_files([weights]) == {"model.safetensors": truth} and len(hashed) == 2
    own_cache.write_text("{broken")
    assert hash_files([weights]) == {"model.safetensors": truth} and len(hashed) == 3
    assert json.loads(own_cache.read_text())


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "sha256.json"
    assert set(hash_files([folder / "model.safetensors"], cache)) == {"model.safetensors"}


def test_a_hub_s_cache_tells_name_and_revision(tiny_llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--small" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_llama, snapshot)
    found = find_model(str(snapshot))
    assert (found.name, found.revision) == ("org/small", "0123abcd")
    assert find_model(str(snapshot), name="mine").name == "mine"


def test_a_model_without_tokenizer_has_an_identity(folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("special*")]:
        path.unlink()
    assert len(identity(folder).semantic.tokenizer_sha256) == 64


def test_what_is_no_model_is_refused_in_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="revision 'main' is for a hub id"):
        find_model(str(folder), revision="main")
    with pytest.raises(ValueError, match="neither a folder nor a model"):
        find_model(str(folder / "absent" / "deeper"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="other formats can run code"):
        find_model(str(folder))


def test_a_file_replaced_or_rewritten_with_its_size_and_time_kept_is_noticed(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED_NS", 0)
    weights = folder / "model.safetensors"

    def replaced() -> None:
        other = folder.parent / "other"
        shutil.copy2(weights, other)
        flip(other)
        other.replace(weights)

    for change in (lambda: flip(weights), replaced):
        times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
        size, before = weights.stat().st_size, identity(folder)
        change()
        os.utime(weights, ns=times)
        assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (size, times[1])
        assert identity(folder).fingerprint != before.fingerprint
        assert (
            identity(folder).semantic.weights["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        )


def test_a_file_that_is_being_written_is_hashed_and_not_remembered(folder: Path, own_cache: Path) -> None:
    hash_files([folder / "model.safetensors"])
    assert not own_cache.exists()

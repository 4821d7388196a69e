"""The attention service over real HTTP: SmolLM2 against transformers, and everything that is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from attention_service.settings import PREFIX, AttentionSettings, parse_settings
from student_trainer.losses.attention_relations import attention_relations
from teacher_proto.attention import AttentionRequest
from teacher_proto.client.sync_client import SyncAttentionClient
from teacher_proto.compute.relations import QKV, layer_index, relations
from teacher_proto.errors import NotFoundError, TeacherUnavailableError, WrongTeacherError
from teacher_proto.identity import TeacherIdentity
from teacher_proto.wire.records import MSGPACK, encode_request
from teacher_proto.wire.responses import sequence_crc
from tests.teacher_process import AttentionProcess, TeacherProcess
from tests.unit.attention_service.models import save_tiny
from tests.unit.attention_service.reference import PARTS, load_whole, true_maps, true_states

TEXTS = (
    "A still separates what boils at different heats; the first of the run is thrown away, the heart is kept.",
    "def fold(values, start):\n    total = start\n    for value in values:\n        total += value\n    return total\n",
    "Short.",
)
HEAVY = ("torch", "fastapi", "transformers", "uvicorn")
KEY = "alice-key-0123456789abcdef"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[AttentionProcess]:
    with AttentionProcess(folder, "--layer", "2", "--max-entries", "40000", "--capacity", "400000") as process:
        yield process


@pytest.fixture(scope="module")
def smollm2(demo_teacher: Path) -> Iterator[AttentionProcess]:
    with AttentionProcess(demo_teacher, "--dtype", "float32") as process:
        yield process


@pytest.fixture(scope="module")
def whole(demo_teacher: Path) -> Any:
    return load_whole(demo_teacher)


@pytest.fixture(scope="module")
def text_tokens(demo_teacher: Path) -> list[np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(demo_teacher)
    return [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]


def ask(service: AttentionProcess, tokens: list[np.ndarray], **fields: Any) -> list[Any]:
    with SyncAttentionClient(service.url) as client:
        return client.attention(AttentionRequest(sequences=tuple(tokens), **fields))


def test_states_of_a_real_model_are_those_of_a_plain_forward_pass(
    smollm2: AttentionProcess, whole: Any, text_tokens: list[np.ndarray]
) -> None:
    for answer, tokens_T in zip(ask(smollm2, text_tokens), text_tokens, strict=True):
        assert answer.layer == 21
        for part, truth in true_states(whole, tokens_T, 21).items():
            np.testing.assert_allclose(answer.states()[part], truth, rtol=2e-3, atol=1e-3 * np.abs(truth).max())


def test_a_record_says_whose_it_is_to_who_asks_for_it(tiny: AttentionProcess) -> None:
    request = AttentionRequest(sequences=([1, 2, 3], [4, 5, 6]), layer=2)
    headers = {"content-type": MSGPACK, "accept": MSGPACK, "x-sequence-crc": "1"}
    response = httpx.post(f"{tiny.url}/v1/attention", content=encode_request(request), headers=headers, timeout=60)
    told = {m["index"]: m["sequence_crc"] for m in msgpack.Unpacker(io.BytesIO(response.content)) if "index" in m}
    assert told == {index: sequence_crc(index, tokens_T) for index, tokens_T in enumerate(request.sequences)}


def test_maps_of_a_real_model_are_those_of_output_attentions(
    smollm2: AttentionProcess, whole: Any, text_tokens: list[np.ndarray]
) -> None:
    for answer, tokens_T in zip(ask(smollm2, text_tokens, kind="maps", layer=7), text_tokens, strict=True):
        np.testing.assert_allclose(answer.maps.astype(np.float32), true_maps(whole, tokens_T, 7), atol=6e-4)


@pytest.mark.parametrize("form", ["official", "paper", "minilm"])
def test_relations_rebuilt_from_served_states_are_the_served_relations(
    smollm2: AttentionProcess, text_tokens: list[np.ndarray], form: str
) -> None:
    served = ask(smollm2, text_tokens, kind="relations", form=form)
    for states, tables in zip(ask(smollm2, text_tokens), served, strict=True):
        for part in PARTS:
            rebuilt = relations(torch.tensor(states.states()[part]), form=form, relation_heads=32).numpy()
            np.testing.assert_allclose(getattr(tables, part).astype(np.float32), rebuilt, atol=5e-4)


@pytest.mark.parametrize("form", ["official", "paper", "minilm"])
def test_int8_moves_relations_a_hundred_times_less_than_a_student_differs(
    smollm2: AttentionProcess, demo_teacher: Path, whole: Any, text_tokens: list[np.ndarray], form: str
) -> None:
    tokens_T = text_tokens[0]
    student = load_whole(demo_teacher.parent / "student")
    student_layer = layer_index("late_middle", num_layers=student.config.num_hidden_layers)
    (packed,) = ask(smollm2, [tokens_T], dtype="int8")
    truth = _qkv(true_states(whole, tokens_T, 21))

    def divergence(other: QKV) -> float:
        return float(attention_relations(other, truth, form=form, relation_heads=32).total)

    transport, difference = (
        divergence(_qkv(packed.states())),
        divergence(_qkv(true_states(student, tokens_T, student_layer))),
    )
    assert 0 <= transport * 100 < difference


def _qkv(states: dict[str, np.ndarray]) -> QKV:
    return QKV(*(torch.tensor(states[part])[None] for part in PARTS))


def test_the_answers_to_a_batch_are_those_to_each_alone(tiny: AttentionProcess) -> None:
    tokens = [np.arange(n) % 512 for n in (40, 3, 17, 1)]
    for together, one in zip(ask(tiny, tokens), tokens, strict=True):
        (alone,) = ask(tiny, [one])
        for part in PARTS:
            np.testing.assert_allclose(getattr(together, part), getattr(alone, part), atol=4e-3)


def test_json_says_the_same_as_msgpack(tiny: AttentionProcess) -> None:
    fields = {"sequences": [[5, 6, 7]], "layer": 1, "kind": "maps"}
    (packed,) = ask(tiny, [np.array([5, 6, 7])], layer=1, kind="maps")
    body = httpx.post(f"{tiny.url}/v1/attention", json=fields).json()
    assert (body["layer"], body["kind"], body["num_layers"], body["fingerprint"]) == (1, "maps", 4, tiny.fingerprint)
    np.testing.assert_array_equal(np.array(body["sequences"][0]["maps"], dtype=np.float16), packed.maps)


REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "a layer above the cut": ({"layer": 3}, 404, "layer", "holds layers 0 to 2: request one of those"),
    "a layer that is nowhere": ({"layer": 99}, 404, "layer", "has layers 0 to 3"),
    "a name of no layer": ({"layer": "top"}, 422, "layer", "late_middle"),
    "R that divides no width": ({"kind": "relations", "relation_heads": 7}, 422, "relation_heads", "one of 1, 2, 4"),
    "a kind that is none": ({"kind": "gradients"}, 422, "kind", "states"),
    "a token beyond the vocabulary": ({"sequences": [[512]]}, 422, "sequences.0", "0 to 511"),
    "too long a sequence": ({"sequences": [[1] * 257]}, 422, "sequences.0", "expected 1 to 256"),
    "an answer that is too large": (
        {"sequences": [[1] * 200], "kind": "relations", "relation_heads": 8}, 422, "sequences.0", "fewer `rows`",
    ),
    "rows out of order": ({"kind": "maps", "rows": [[2, 1]]}, 422, "rows.0", "ascending"),
    "rows of states": ({"rows": [[1]]}, 422, "rows", "the states of all positions"),
    "an unknown field": ({"top_k": 4}, 400, "top_k", "unknown field"),
    "another teacher": ({"fingerprint": "0" * 32 + "." + "0" * 16}, 409, "fingerprint", "GET /v1/teacher"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_and_the_engine_is_never_called(tiny: AttentionProcess, name: str) -> None:
    fields, status, field, message = REFUSED[name]
    before = engine_sequences(tiny)
    response = httpx.post(f"{tiny.url}/v1/attention", json={"sequences": [[1, 2, 3]]} | fields)
    body = response.json()
    assert (response.status_code, body["field"], body["retryable"]) == (status, field, False)
    assert message in body["message"]
    assert engine_sequences(tiny) == before


def engine_sequences(service: AttentionProcess) -> float:
    lines = httpx.get(f"{service.url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("stillhouse_engine_sequences_total"))


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [(b"\xc1", MSGPACK, 400), (b"{", "application/json", 400), (b"x", "text/plain", 415),
     (b"[]", "application/json", 400),     (b"\x81\xa9sequences\x91" + b"\x91" * 5_000_000, MSGPACK, 400)],
)  # fmt: skip
def test_bytes_that_are_no_request_are_refused(
    tiny: AttentionProcess, content: bytes, content_type: str, status: int
) -> None:
    response = httpx.post(f"{tiny.url}/v1/attention", content=content, headers={"Content-Type": content_type})
    assert response.status_code == status and not response.json()["retryable"]


def test_the_client_refuses_another_layer_and_another_teacher_with_what_differs(tiny: AttentionProcess) -> None:
    with SyncAttentionClient(tiny.url) as client:
        info = client.teacher()
        with pytest.raises(NotFoundError, match="--layer 3"):
            client.attention(AttentionRequest(sequences=([1],), layer="last"))
    semantic = info.identity.semantic.model_copy(update={"revision": "v2", "dtype": "bfloat16"})
    teacher = TeacherIdentity(semantic=semantic, numeric=info.identity.numeric)
    with SyncAttentionClient(tiny.url, beside=teacher) as client, pytest.raises(WrongTeacherError) as caught:
        client.teacher(1.0)
    assert "semantic.revision: expected v2, got local" in caught.value.message and "--dtype" in caught.value.message


def test_routes_are_those_of_every_service(tiny: AttentionProcess) -> None:
    assert httpx.get(f"{tiny.url}/health/live").json() == {"status": "live"}
    assert httpx.get(f"{tiny.url}/health/ready").json() == {"status": "ready"}
    assert httpx.get(f"{tiny.url}/v1/status").json()["engine"].startswith("transformers attention")
    described = httpx.get(f"{tiny.url}/openapi.json").json()["paths"]
    assert {"/v1/attention", "/v1/teacher", "/v1/status", "/metrics", "/health/ready"} <= set(described)
    assert "late_middle" in str(described["/v1/attention"])
    for page in ("/", "/docs"):
        assert httpx.get(tiny.url + page).headers["content-type"].startswith("text/html")


def test_every_route_but_the_probes_asks_for_the_key(folder: Path) -> None:
    with AttentionProcess(folder, "--layer", "0", keys=f"alice {KEY}") as service:
        body = encode_request(AttentionRequest(sequences=([1, 2],), layer=0))
        for method, path in (("POST", "/v1/attention"), ("GET", "/v1/teacher"), ("GET", "/metrics"), ("GET", "/")):
            assert httpx.request(method, service.url + path, content=body).status_code == 401
        assert httpx.get(f"{service.url}/health/ready").status_code == 200
        with SyncAttentionClient(service.url, key=KEY) as client:
            assert len(client.attention(AttentionRequest(sequences=([1, 2],), layer=0))) == 1
        assert KEY not in service.log


def test_a_sidecar_takes_name_and_dtype_of_its_teacher_and_refuses_another_model(folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "tiny-qwen3", "qwen3", seed=1)
    with TeacherProcess(str(folder), "--engine", "hf", "--name", "the-teacher") as teacher:
        with AttentionProcess(folder, "--teacher-url", teacher.url) as service:
            assert service.model == "the-teacher"
            assert service.fingerprint.split(".")[0] == teacher.fingerprint.split(".")[0]
        refused = run(str(other), "--teacher-url", teacher.url, "--port", "0")
    assert refused.returncode == 2
    assert "that teacher serves another model: semantic.weights.model.safetensors:" in refused.stderr


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
    return subprocess.run(
        [sys.executable, "-m", "attention_service.main", *arguments], capture_output=True, text=True, timeout=180,
        env=inherited | {"HF_HUB_OFFLINE": "1"} | environment, check=False,
    )  # fmt: skip


def test_help_names_every_option_and_imports_nothing_heavy() -> None:
    probe = f"""
import sys, attention_service.main as main
try:
    main.main(["--help"])
except SystemExit as exit:
    print("LOADED", [name for name in {HEAVY!r} if name in sys.modules], exit.code)
"""
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert "LOADED [] 0" in result.stdout
    for name in AttentionSettings.model_fields:
        assert name == "model" or f"--{name.replace('_', '-')}" in result.stdout


def test_the_old_names_of_the_teachers_options_still_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://teacher:8000"
    settings = parse_settings(["m", "--beside", url, "--beside-key", KEY])
    assert settings.teacher_url == url and settings.teacher_key is not None
    assert "--beside is now called --teacher-url" in capsys.readouterr().err
    monkeypatch.setenv(f"{PREFIX}BESIDE", url)
    monkeypatch.setenv(f"{PREFIX}BESIDE_KEY", KEY)
    assert parse_settings(["m"]) == settings
    said = capsys.readouterr().err
    assert f"{PREFIX}BESIDE_KEY is now called {PREFIX}TEACHER_KEY" in said and KEY not in said
    monkeypatch.setenv(f"{PREFIX}TEACHER_URL", "http://other:8000")
    assert parse_settings(["m"]).teacher_url == "http://other:8000"
    assert parse_settings(["m", "--teacher-url", url]).teacher_url == url


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "model is missing: use stillhouse-attention MODEL, or set STILLHOUSE_ATTENTION_MODEL"),
        (("m", "--layer", "top"), "--layer: attention layer: got 'top'"),
        (("m", "--layer", "1.5"), "--layer: attention layer: got 1.5"),
        (("m", "--laye", "1"), "'--laye' is not an option"),
        (("m", "--teacher-key", KEY), "--teacher-key needs --teacher-url"),
        (("m", "--tls-cert", "c.pem"), "--tls-cert and --tls-key go together"),
    ],
)
def test_a_users_mistake_is_a_value_error_in_one_line(
    arguments: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(f"{PREFIX}MODEL", raising=False)
    with pytest.raises(ValueError) as caught:
        parse_settings(list(arguments))
    assert reason in str(caught.value) and "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_a_layer_that_the_model_has_not_ends_the_start_with_one_line(folder: Path) -> None:
    result = run(str(folder), "--layer", "9", "--port", "0")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("stillhouse-attention: ")]
    assert result.returncode == 2 and "the model has layers 0 to 3" in line


def test_options_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}MODEL", "m")
    monkeypatch.setenv(f"{PREFIX}LAYER", "5")
    assert parse_settings([]).highest_layer(10) == 5
    assert parse_settings(["--layer", "0.5"]).highest_layer(10) == 5
    assert parse_settings(["--layer", "-1"]).highest_layer(10) == 9


def test_a_dead_sidecar_is_an_error_that_says_what_to_do(folder: Path) -> None:
    service = AttentionProcess(folder, "--layer", "0")
    with service, SyncAttentionClient(service.url) as client:
        client.teacher()
        service.stop()
        with pytest.raises(TeacherUnavailableError, match=r"attention service.*stillhouse-attention MODEL"):
            client.attention(AttentionRequest(sequences=([1],), layer=0), deadline_s=1.0)

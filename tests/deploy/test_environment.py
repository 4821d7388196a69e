"""Every variable that deploy/ sets, held against what the code of its service reads; and what comes of them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from attention_service.settings import AttentionSettings
from attention_service.settings import parse_settings as parse_attention
from serving.settings import ServiceSettings, unknown_variables, variables
from student_trainer.settings.teacher import TeacherSettings as StudentsTeacher
from teacher_service.settings import TeacherSettings
from teacher_service.settings import parse_settings as parse_teacher
from tests.deploy.test_manifests import COMPOSE, KUBERNETES, documents
from tests.docs.markdown import ROOT
from tests.teacher_process import TeacherProcess

PROGRAMS = ("teacher", "attention", "trainer", "demo-models")
OWN = {
    "teacher": variables(TeacherSettings),
    "attention": variables(AttentionSettings),
    "trainer": {StudentsTeacher.model_fields["key_variable"].default},
    "demo-models": set(re.findall(r"environ.get\(\"(\w+)\"", (ROOT / "demo/prepare.py").read_text())),
}
# Read by what is not ours: the module that does, whose source must name it, or who else does.
LIBRARIES = {
    "HF_TOKEN": "huggingface_hub.constants", "HF_HOME": "huggingface_hub.constants",
    "XDG_CACHE_HOME": "huggingface_hub.constants", "WANDB_API_KEY": "wandb.env",
    "VLLM_CACHE_ROOT": "vllm.envs", "TORCHINDUCTOR_CACHE_DIR": "torch._inductor.runtime.cache_dir_utils",
}  # fmt: skip
OTHERS = {
    "PATH": "the shell", "HOME": "the shell", "PYTHONUNBUFFERED": "Python", "PYTHONDONTWRITEBYTECODE": "Python",
    "PYTHONPATH": "Python", "TRITON_CACHE_DIR": "Triton, on a GPU", "TOKENIZERS_PARALLELISM": "tokenizers, in Rust",
    "CUDA_VISIBLE_DEVICES": "CUDA", "OMP_WAIT_POLICY": "OpenMP", "GOMP_SPINCOUNT": "libgomp",
}  # fmt: skip
GRAFANA = re.compile(r"GF_(SECURITY|USERS|ANALYTICS)_\w+")  # GF_SECTION_KEY, of its own documentation


def of_dockerfile() -> dict[str, dict[str, str]]:
    """Variables of each stage, with those of the stage that it is made from."""
    text = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, dict[str, str]] = {}
    stage = ""
    for line in text.splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            stage = match[2]
            stages[stage] = dict(stages.get(match[1], {}))
        elif line.startswith("ENV "):
            stages[stage] |= dict(re.findall(r"(\w+)=(\S+)", line))
    return stages


def told() -> Iterator[tuple[str, str, dict[str, str]]]:
    """(where, program, variables) of everything that runs."""
    stages = of_dockerfile()
    yield from ((f"Dockerfile, {program}", program, stages[program]) for program in PROGRAMS)
    for path in COMPOSE:
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            program = service["build"]["target"] if "build" in service else name
            environment = {key: str(value) for key, value in service.get("environment", {}).items()}
            for secret in service.get("secrets", []):
                mounted = secret["target"] if isinstance(secret, dict) else secret
                if mounted[0].isupper():  # deploy/with-secrets makes a variable of it
                    environment[mounted] = "a secret of more than 16 letters"
            yield f"{path.name}, {name}", program, stages.get(program, {}) | environment
    for path in KUBERNETES:
        for document in documents(path):
            for container in document["spec"].get("template", {}).get("spec", {}).get("containers", []):
                program = container["image"].split("/")[-1].split(":")[0]
                environment = {v["name"]: v.get("value", "a secret of 16 letters") for v in container.get("env", [])}
                yield f"{path.name}, {container['name']}", program, stages[program] | environment


TOLD = [pytest.param(program, environment, id=where) for where, program, environment in told()]


@pytest.mark.parametrize(("program", "environment"), TOLD)
def test_no_variable_is_set_that_nobody_reads(program: str, environment: dict[str, str]) -> None:
    known = OWN.get(program, set()) | LIBRARIES.keys() | OTHERS.keys()
    unknown = {name for name in environment if name not in known and not GRAFANA.fullmatch(name)}
    assert unknown == set()
    if GRAFANA.match(" ".join(environment)):
        assert program == "grafana"


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_is_said_to_read_it_does(name: str) -> None:
    package = LIBRARIES[name].split(".")[0]
    if (found := importlib.util.find_spec(package)) is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    path = Path(found.submodule_search_locations[0], *LIBRARIES[name].split(".")[1:]).with_suffix(".py")
    assert name in path.read_text()


@pytest.mark.parametrize(("program", "environment"), TOLD)
def test_a_service_in_a_container_listens_outside_with_keys_beside_its_teacher(
    program: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if program not in ("teacher", "attention"):
        return
    for name in [name for name in os.environ if name.startswith("STILLHOUSE_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        if name in OWN[program]:
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    settings: Any = (parse_teacher if program == "teacher" else parse_attention)(["some/model"])
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)
    if any(name.endswith("_KEYS") for name in environment):
        assert settings.keys is not None and settings.drain_time == 60
        if program == "attention":
            assert settings.teacher_url.startswith("http://teacher") and settings.teacher_key is not None
        else:
            assert str(settings.store) == "/store" and settings.store_bytes > 2**30


def test_the_settings_of_compose_and_its_example_are_the_same() -> None:
    """.env.example names nothing that no compose file reads; what must be given is in it."""
    example = {
        line.split("=")[0] for line in (ROOT / ".env.example").read_text().splitlines() if re.match(r"\w+=", line)
    }
    text = "\n".join(path.read_text() for path in COMPOSE)
    assert example - set(re.findall(r"\$\{(\w+)", text)) == {"COMPOSE_PROJECT_NAME", "COMPOSE_PROFILES"}
    required = set(re.findall(r"\$\{(\w+):\?copy .env.example", text))
    assert required and required <= example


@pytest.mark.parametrize(
    ("kind", "prefix"), [(TeacherSettings, "STILLHOUSE_"), (AttentionSettings, "STILLHOUSE_ATTENTION_")]
)
def test_a_variable_that_was_misspelt_stops_the_start(kind: type[ServiceSettings], prefix: str) -> None:
    assert unknown_variables(kind, {f"{prefix}KYES": "/run/secrets/keys", f"{prefix}HOST": "::"}) == [f"{prefix}KYES"]
    passed = {
        "STILLHOUSE_KEY": "a", "STILLHOUSE_ATTENTION_HOST": "::", "STILLHOUSE_DEMO": "/models", "STILLHOUSE_PORT": "1",
        f"{prefix}SERVICE_HOST": "10.0.0.1", f"{prefix}PORT_8000_TCP_ADDR": "10.0.0.1", f"{prefix}ANYTHING": "",
    }  # fmt: skip
    assert unknown_variables(kind, passed) == []
    module = "teacher_service.main" if kind is TeacherSettings else "attention_service.main"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
    done = subprocess.run(
        [sys.executable, "-m", module, "some/model"], env=environment | {f"{prefix}KYES": "/run/secrets/keys"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and f"{kind.program} has no variable {prefix}KYES" in done.stderr


KEYS = "alice 0123456789abcdef"


@pytest.mark.parametrize(
    ("host", "keys", "options", "fault"),
    [
        ("0.0.0.0", KEYS, (), ""),
        ("127.0.0.1", KEYS, (), "cannot be reached"),
        ("0.0.0.0", None, (), "it responded 200 to a request without a key"),
        ("0.0.0.0", None, ("--open",), ""),
    ],
)
def test_the_health_check_sees_what_others_would(
    host: str, keys: str | None, options: tuple[str, ...], fault: str
) -> None:
    with TeacherProcess("--host", host, keys=keys, wait=True) as teacher:
        # An address of this machine at which nobody is heard who listens at 127.0.0.1 alone.
        command = [sys.executable, "-m", "serving.health_check", "--host", "127.0.0.2", "--port", str(teacher.port)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (1 if fault else 0), done.stderr
    assert fault in done.stderr and done.stderr.count("\n") == bool(fault)

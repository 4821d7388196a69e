"""docker-compose.yml and deploy/kubernetes: their schemas, and what no change may undo: no root, no capability, nothing
written to an image, no port but what is meant, nothing latest, a grace that is longer than the drain.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.markdown import ROOT

COMPOSE = [ROOT / "docker-compose.yml", ROOT / "deploy/student.compose.yml"]
KUBERNETES = sorted(path for path in (ROOT / "deploy/kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
SERVICES = [
    pytest.param(service, id=f"{path.name}-{name}")
    for path in COMPOSE
    for name, service in yaml.safe_load(path.read_text())["services"].items()
]
PUBLISHED = {
    "${TEACHER_BIND:-127.0.0.1}:${TEACHER_PORT:-8000}:8000",
    "${GRAFANA_BIND:-127.0.0.1}:${GRAFANA_PORT:-3000}:3000",
}
DRAIN_S = 60


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pods() -> list[Any]:
    return [
        pytest.param(document["spec"]["template"]["spec"], id=f"{document['kind']}-{document['metadata']['name']}")
        for path in KUBERNETES
        for document in documents(path)
        if "template" in document["spec"]
    ]


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_files_keep_to_the_specification(path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_confined(service: dict[str, Any]) -> None:
    assert service["user"].split(":")[0] not in ("0", "root")
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & service.keys()
    assert set(service.get("ports", [])) <= PUBLISHED
    assert ":" in service["image"] and "latest" not in service["image"]
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", []))


@pytest.mark.parametrize("service", SERVICES)
def test_a_key_is_a_secret_and_no_variable(service: dict[str, Any]) -> None:
    named = {name for name in service.get("environment", {}) if "KEY" in name or "PASSWORD" in name or "TOKEN" in name}
    assert named <= {"STILLHOUSE_KEYS", "STILLHOUSE_ATTENTION_KEYS", "GF_SECURITY_ADMIN_PASSWORD__FILE"}
    assert all(service["environment"][name].startswith("/run/secrets/") for name in named)


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_a_profile_is_whole_and_starts_in_order(profile: str) -> None:
    services = yaml.safe_load(COMPOSE[0].read_text())["services"]
    chosen = {name: service for name, service in services.items() if profile in service["profiles"]}
    tail = "-cpu" if profile == "cpu" else ""
    assert {f"teacher{tail}", f"attention{tail}", f"trainer{tail}", "prometheus", "grafana"} <= chosen.keys()
    # The trainer starts beside the teacher and waits for it by itself; the attention service asks it at its start.
    assert chosen[f"trainer{tail}"]["depends_on"] == {f"teacher{tail}": {"condition": "service_started"}}
    assert "teacher.start_within_s=3600" in chosen[f"trainer{tail}"]["command"]
    assert chosen[f"attention{tail}"]["depends_on"] == {f"teacher{tail}": {"condition": "service_healthy"}}
    for name, service in chosen.items():
        assert set(service.get("depends_on", {})) <= chosen.keys()
        if name.startswith(("teacher", "attention")):
            assert service["healthcheck"]["test"] == ["CMD", "python", "-m", "serving.health_check"]
            drains = [value for key, value in service["environment"].items() if key.endswith("_DRAIN_TIME")]
            assert drains == [str(DRAIN_S)]
            assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_S


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_manifests_keep_to_the_schemas(path: Path) -> None:
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "--quiet", "-k", "1.34", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("pod", pods())
def test_a_pod_is_confined(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True and context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert ":" in container["image"] and not any("hostPort" in port for port in container["ports"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claimed = {"models", "store"} if "teacher" in container["image"] else set()
        assert mounted == {volume["name"] for volume in pod["volumes"]} | claimed
        for variable in container.get("env", []):
            if variable["name"].endswith(("_KEY", "_TOKEN")):
                assert "secretKeyRef" in variable["valueFrom"]


def test_a_trainer_that_is_evicted_comes_back_and_one_that_cannot_run_does_not() -> None:
    [job] = [document for path in KUBERNETES for document in documents(path) if document["kind"] == "Job"]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_code = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert by_code == {2: "FailJob", 75: "Ignore"}
    assert any(rule["action"] == "Ignore" and "onPodConditions" in rule for rule in rules)
    assert job["spec"]["podReplacementPolicy"] == "Failed"
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert any(argument.startswith("run.id=") for argument in arguments)


def test_services_speak_to_each_other_by_names_that_exist() -> None:
    kinds = {(document["kind"], document["metadata"]["name"]): document
             for path in KUBERNETES for document in documents(path)}  # fmt: skip
    budget = kinds["PodDisruptionBudget", "teacher"]["spec"]["selector"]
    assert budget == kinds["StatefulSet", "teacher"]["spec"]["selector"] == {"matchLabels": {"app": "teacher"}}
    job = kinds["Job", "trainer"]["spec"]["template"]
    url = next(a for a in job["spec"]["containers"][0]["args"] if a.startswith("teacher.url="))
    replicas = kinds["StatefulSet", "teacher"]["spec"]["replicas"]
    assert url.count("http://teacher-") == replicas > 1
    [allowed, _] = kinds["NetworkPolicy", "teacher"]["spec"]["ingress"][0]["from"]
    assert allowed["podSelector"]["matchLabels"].items() <= job["metadata"]["labels"].items()


@pytest.mark.parametrize("pod", pods())
def test_what_a_pod_is_told_are_settings_that_exist(pod: dict[str, Any]) -> None:
    from attention_service.settings import parse_settings as parse_attention
    from student_trainer.cli.compose import compose
    from teacher_service.settings import parse_settings

    container = pod["containers"][0]
    if "teacher" in container["image"]:
        settings = parse_settings(container["args"])
        assert settings.max_model_len == 8192
    elif "attention" in container["image"]:
        assert parse_attention(container["args"]).model == "Qwen/Qwen3-8B"
    else:
        assert compose(container["args"]).run.id == "first"


def test_the_trainers_of_compose_are_told_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from student_trainer.cli.compose import compose

    services = yaml.safe_load(COMPOSE[0].read_text())["services"]
    told = dict(line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if "=" in line)
    gpu = services["trainer"]["command"].replace("${RUN_ID:-first}", told["RUN_ID"])
    head, _ = gpu.split("${TRAINER_SETTINGS")
    assert compose([*head.split(), *told["TRAINER_SETTINGS"].split()]).run.steps == 2000
    cpu = services["trainer-cpu"]["command"].replace("${RUN_ID:-first}", "first").replace("${CPU_TRAINER:-", "")
    assert compose(cpu.rstrip("}").split()).checkpoint.every == 20


def test_secrets_are_made_once_and_open_the_teacher(tmp_path: Path) -> None:
    from serving.http.keys import Keys

    folder = tmp_path / "secrets"

    def make() -> dict[str, str]:
        subprocess.run([ROOT / "deploy/make-secrets"], env=os.environ | {"SECRETS": str(folder)}, check=True)
        return {path.name: path.read_text() for path in folder.iterdir()}

    made = make()
    told = {secret["file"].rpartition("/")[2] for path in COMPOSE
            for secret in yaml.safe_load(path.read_text())["secrets"].values()}  # fmt: skip
    assert made.keys() == told
    assert folder.stat().st_mode & 0o777 == 0o700
    keys = Keys(folder / "keys")
    assert keys.client(made["STILLHOUSE_KEY"]) == "trainer"
    assert keys.client(made["prometheus_key"]) == "prometheus"
    (folder / "HF_TOKEN").write_text("mine")
    assert make() == made | {"HF_TOKEN": "mine"}

#!/usr/bin/env python3
"""Starts docker-compose.yml's profile `cpu` and checks it against what docs/deployment.md says about it.

    deploy/try_compose.py [--no-build] [--without attention-cpu,grafana] [--build-option=--network=host ...]

Needs Docker with BuildKit and compose (`docker compose`, or docker-compose 1.29), and only Python's standard library.
Uses its own project, `stillhouse-try`, and removes it with its volumes at the end. Prints a line for each finding; the
first that does not hold ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "stillhouse-try"
GRACE_S = 120
IMAGES = {  # image -> target, extra, system packages
    "trainer-cpu": ("trainer", "trainer", ""),
    "demo-models": ("demo-models", "trainer", ""),
    "teacher-cpu": ("teacher", "teacher-cpu", "libnuma1"),
    "attention-cpu": ("attention", "attention", ""),
}
LIMITS_GB = {"trainer-cpu": 2.0, "teacher-cpu": 5.0, "attention-cpu": 5.0, "demo-models": 5.0}
PUBLISHED = {"teacher-cpu": ["8000/tcp"], "grafana": ["3000/tcp"]}
# A teacher that responds at once, but starts after the trainer is waiting: what remains is the trainer's own time.
SCRIPTED = {
    "RUN_ID": "scripted",
    "CPU_TEACHER": """scripted --engine scripted --script '{"vocab_size": 49152, "start_s": 40}'""",
    "CPU_TRAINER": "student.checkpoint_path=/models/demo/student distillation=logits_only logging.wandb=off "
    "teacher.sanity=off teacher.same_tokenizer=trust evaluation.samples=0 data=text data.sources.text.kind=jsonl "
    "data.sources.text.path=/models/demo/text/prose.jsonl data.sources.text.held_out_fraction=0.1 data.seq_len=128 "
    "data.rows=2 data.held_out_rows=1",
}
FIRST_STEP_WITHIN_S = 5.0
DOCKER = os.environ.get("DOCKER", "docker")


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/try_compose.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--no-build", action="store_true", help="use the existing images")
    parser.add_argument("--without", default="", help="services to leave out, separated by commas")
    parser.add_argument("--build-option", action="append", default=[], help="passed to `docker build`")
    options = parser.parse_args()
    services = [name for name in ("teacher-cpu", "attention-cpu", "trainer-cpu", "prometheus", "grafana")
                if name not in options.without.split(",")]  # fmt: skip
    if not options.no_build:
        for image in IMAGES:
            build(image, options.build_option)
    with tempfile.TemporaryDirectory(prefix="stillhouse-try-") as folder:
        lab = Lab(Path(folder))
        try:
            lab.try_all(services)
        except Failure as failure:
            print(f"FAILED: {failure}")
            print(lab.compose("logs", "--tail", "40", check=False))
            return 1
        finally:
            lab.compose("down", "--volumes", "--timeout", str(GRACE_S), check=False)
    return 0


class Failure(Exception):
    """A finding that does not hold."""


def build(image: str, options: list[str]) -> None:
    target, extra, packages = IMAGES[image]
    arguments = {"EXTRA": extra, "TORCH_BACKEND": "cpu", "APT_PACKAGES": packages}
    given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
    run(DOCKER, "build", "-q", "-f", "deploy/Dockerfile", "--target", target, "-t", f"stillhouse/{image}:0.1.0",
        *given, *options, ".", environment={"DOCKER_BUILDKIT": "1"})  # fmt: skip
    size_gb = int(run(DOCKER, "image", "inspect", "-f", "{{.Size}}", f"stillhouse/{image}:0.1.0")) / 1e9
    require(size_gb <= LIMITS_GB[image], f"image {image}: {size_gb:.2f} GB, at most {LIMITS_GB[image]:g} allowed")


class Lab:
    """One compose project, with its secrets and settings in a temporary folder."""

    def __init__(self, folder: Path):
        self._compose = ["docker", "compose"] if plugin_is_there() else ["docker-compose"]
        shutil.copy(ROOT / ".env.example", folder / "env")
        self._environment = {
            "COMPOSE_PROJECT_NAME": PROJECT, "COMPOSE_PROFILES": "cpu", "SECRETS": str(folder / "secrets"),
            "DATA": str(folder), "TEACHER_PORT": "18000", "GRAFANA_PORT": "13000",
        }  # fmt: skip
        self._env_file = folder / "env"
        run(str(ROOT / "deploy/make-secrets"), environment=self._environment)

    def try_all(self, services: list[str]) -> None:
        started = time.time()
        self.compose("up", "-d", "--no-build", *services)
        first = self.wait("the first step", 600, lambda: self.metrics()[:1])[0]
        ready, began = self.ready_since("teacher-cpu"), self.started("trainer-cpu")
        say(f"first step {first['time'] - started:.0f} s after `up`, {first['time'] - began:.0f} s after the trainer's "
            f"start, {first['time'] - ready:.1f} s after the teacher was ready")  # fmt: skip
        require(began < ready < first["time"], "the trainer started alongside the teacher and waited for it")
        for service in services:
            self.check_confined(service)
        self.teacher_killed()
        if "prometheus" in services:
            self.prometheus_sees()
        if "attention-cpu" in services:
            self.wait("a healthy attention service", 300, lambda: self.healthy("attention-cpu"))
        step, codes = self.stop(services)
        require(codes["teacher-cpu"] == 0 and codes["trainer-cpu"] == 75, f"exit codes: {codes}")
        self.compose("down", "--timeout", str(GRACE_S))
        self.compose("up", "-d", "--no-build", *services)
        resumed = f"resumed at step {step} "
        self.wait(f"'{resumed}'", 300, lambda: resumed in self.compose("logs", "trainer-cpu"))
        self.wait("a step after it", 120, lambda: self.metrics()[-1]["step"] > step)
        say(f"down and up again: resumed at step {step} and continued")
        self.compose("down", "--timeout", str(GRACE_S))
        self.scripted()

    def scripted(self) -> None:
        self._environment |= SCRIPTED
        self.compose("up", "-d", "--no-build", "teacher-cpu", "trainer-cpu")
        first = self.wait("the first step", 300, lambda: self.metrics()[:1])[0]
        seconds = first["time"] - self.ready_since("teacher-cpu")
        require(seconds <= FIRST_STEP_WITHIN_S, f"first step {seconds:.1f} s after a scripted teacher was ready")

    def teacher_killed(self) -> None:
        """Kill the teacher with SIGKILL, like the OOM killer: it is restarted by policy, and the trainer goes on."""
        container = self.container("teacher-cpu")
        before = self.metrics()[-1]["step"]
        os.kill(self.inspect(container)["State"]["Pid"], signal.SIGKILL)
        killed = time.time()
        self.wait("the teacher's restart", 60, lambda: self.inspect(container)["RestartCount"] == 1)
        self.wait("a healthy teacher", 300, lambda: self.healthy("teacher-cpu"))
        after = self.wait("steps after it", 600, lambda: [
            line for line in self.metrics() if line["time"] > killed and line["step"] > before + 33])[0]  # fmt: skip
        trainer = self.inspect(self.container("trainer-cpu"))
        require(trainer["RestartCount"] == 0, "the trainer waited and was not restarted")
        steps = [line["step"] for line in self.metrics()]
        require(steps == list(range(1, len(steps) + 1)), "every step was made once")
        longest = max(line["wait_s"] for line in self.metrics() if line["time"] > killed)
        say(f"teacher killed at step {before}: step {after['step']} {after['time'] - killed:.0f} s later, "
            f"the longest wait was {longest:.0f} s")  # fmt: skip

    def check_confined(self, service: str) -> None:
        """No root, no capabilities, nothing written outside volumes, no unexpected port."""
        container = self.container(service)
        about = self.inspect(container)
        status = Path(f"/proc/{about['State']['Pid']}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        uid, caps = fields["Uid"].split()[0], int(fields["CapEff"], 16) | int(fields["CapBnd"], 16)
        require(uid != "0" and caps == 0 and fields["NoNewPrivs"] == "1",
                f"{service}: uid {uid}, {bin(caps).count('1')} capabilities, no new privileges")  # fmt: skip
        require(about["HostConfig"]["ReadonlyRootfs"], f"{service}: its root is read-only")
        ports = [port for port, bound in (about["NetworkSettings"]["Ports"] or {}).items() if bound]
        require(ports == PUBLISHED.get(service, []), f"{service}: published {ports or 'nothing'}")

    def prometheus_sees(self) -> None:
        """Prometheus scrapes teacher and trainer, and has loaded every alert rule."""
        code = "import json,sys,urllib.request as u; print(u.urlopen('http://prometheus:9090'+sys.argv[1]).read().decode())"

        def ask(path: str) -> Any:
            answer = self.compose("exec", "-T", "trainer-cpu", "python", "-c", code, path)
            return json.loads(answer)["data"]

        def up() -> set[str]:
            targets = ask("/api/v1/targets")["activeTargets"]
            return {target["labels"]["job"] for target in targets if target["health"] == "up"}

        self.wait("Prometheus to scrape teacher and trainer", 60, lambda: {"teacher", "trainer"} <= up())
        rules = [rule for group in ask("/api/v1/rules")["groups"] for rule in group["rules"]]
        require(rules and all(rule["health"] != "err" for rule in rules), f"Prometheus evaluates {len(rules)} alerts")

    def stop(self, services: list[str]) -> tuple[int, dict[str, int]]:
        """Stop all services. Returns the step at which the trainer was saved, and the exit codes."""
        containers = {service: self.container(service) for service in services}
        began = time.monotonic()
        self.compose("stop")
        seconds = time.monotonic() - began
        require(seconds < GRACE_S, f"`stop` took {seconds:.1f} s, expected less than the grace period of {GRACE_S} s")
        codes = {service: self.inspect(container)["State"]["ExitCode"] for service, container in containers.items()}
        said = run(DOCKER, "logs", containers["trainer-cpu"])
        return int(said.rsplit("saving at step ", 1)[1].split(",")[0]), codes

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's metrics so far; none before the trainer runs."""
        container = self.container("trainer-cpu")
        path = f"/runs/{self._environment.get('RUN_ID', 'first')}/metrics.jsonl"
        text = run(DOCKER, "exec", container or "none", "cat", path, check=False)
        lines = [line for line in text.splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")]
        return [json.loads(line) for line in lines]

    def wait(self, what: str, seconds: float, found: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := found():
                return value
            time.sleep(0.5)
        raise Failure(f"waited {seconds:g} s for {what}, without success")

    def ready_since(self, service: str) -> float:
        """When the service logged that it is ready, by Docker's timestamp of that line."""
        lines = run(DOCKER, "logs", "--timestamps", self.container(service)).splitlines()
        return timestamp(next(line for line in lines if ": ready at " in line).split()[0])

    def healthy(self, service: str) -> bool:
        return bool(self.inspect(self.container(service))["State"]["Health"]["Status"] == "healthy")

    def started(self, service: str) -> float:
        return timestamp(self.inspect(self.container(service))["State"]["StartedAt"])

    def container(self, service: str) -> str:
        return self.compose("ps", "-q", service).strip()

    def inspect(self, container: str) -> dict[str, Any]:
        return json.loads(run(DOCKER, "inspect", container))[0]

    def compose(self, *arguments: str, check: bool = True) -> str:
        return run(*self._compose, "--env-file", str(self._env_file), *arguments,
                   environment=self._environment, check=check)  # fmt: skip


def plugin_is_there() -> bool:
    return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


def timestamp(text: str) -> float:
    """Parses Docker's timestamps: nanoseconds, and Z or an offset."""
    whole, _, rest = text.partition(".")
    digits = rest.rstrip("Z").split("+")[0].split(" ")[0]
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{digits or 0}")


def run(*command: str, environment: dict[str, str] | None = None, check: bool = True) -> str:
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | (environment or {}))  # fmt: skip
    if check and done.returncode != 0:
        raise Failure(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def require(holds: Any, finding: str) -> None:
    if not holds:
        raise Failure(finding)
    say(finding)


def say(finding: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {finding}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

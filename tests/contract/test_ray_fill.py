"""`fill --ray`: the shards of two engines on a cluster are those of one process, whoever dies on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from teacher_proto.dataset.check import check_dataset, dataset_stats
from teacher_proto.dataset.folder import Folder
from tests.contract.test_dataset_commands import files_of, fill
from tests.contract.test_fill_and_pack import ASK, SCRIPTED, write_data
from tests.models import save_tiny_llama
from tests.teacher_process import free_port

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Alone = tuple[Path, dict[str, bytes]]
UNITS, DOCUMENTS = 12, 120  # of ten documents of 40 tokens
SLOW = ("--script", '{"delay_s": 0.02}', "--window", "100")


class Cluster:
    """Nodes of a Ray cluster as processes of ours: the first is its head. Leaving the block ends them all."""

    def __init__(self, folder: Path, cpus: int = 2):
        self.address = f"127.0.0.1:{free_port()}"
        self._folder, self._nodes = folder, []
        port = self.address.rpartition(":")[2]
        self.add("--head", "--port", port, "--include-dashboard", "false", cpus=cpus)

    def add(self, *options: str, cpus: int = 1) -> subprocess.Popen[bytes]:
        where = options or ("--address", self.address)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--num-cpus", str(cpus), "--block",
            "--node-ip-address", "127.0.0.1", "--object-store-memory", "80000000", "--disable-usage-stats",
        ]  # fmt: skip
        # Signals reach a whole session: a node's processes end with it.
        with (self._folder / "ray.txt").open("ab") as output:
            node = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        self._nodes.append(node)
        return node

    def workers(self, node: subprocess.Popen[bytes] | None = None) -> list[psutil.Process]:
        """Processes of `FillWorker`s, of one node or all."""
        nodes = [one for one in ([node] if node is not None else self._nodes) if one.poll() is None]
        return [
            process for one in nodes for process in psutil.Process(one.pid).children(recursive=True) if works(process)
        ]

    def remove(self, node: subprocess.Popen[bytes]) -> None:
        processes = psutil.Process(node.pid).children(recursive=True)
        for process in [psutil.Process(node.pid), *processes]:
            if process.is_running():
                process.kill()
        node.wait(timeout=30)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *what: object) -> None:
        for node in reversed(self._nodes):
            if node.poll() is None:
                self.remove(node)


def works(process: psutil.Process) -> bool:
    try:
        return "FillWorker" in "".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has just ended
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("ray")) as cluster:
        wait_until(lambda: reached(cluster.address))
        yield cluster


def reached(address: str) -> bool:
    code = f"import ray; ray.init(address={address!r}, log_to_driver=False, configure_logging=False)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def wait_until(true: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The data, and the files that one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    write_data(folder / "data.jsonl", DOCUMENTS)
    assert fill(folder / "data.jsonl", folder / "out").returncode == 0
    return folder / "data.jsonl", files_of(folder / "out")


def start(data: Path, output: Path, cluster: Cluster, *more: str) -> subprocess.Popen[str]:
    words = [
        sys.executable, "-m", "teacher_service.main", "fill", "scripted", str(data), *SCRIPTED, "--output", str(output),
        *ASK, "--shard-tokens", "400", "--ray", cluster.address, "--replicas", "2", *more,
    ]  # fmt: skip
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return said


def shards(output: Path) -> int:
    return len(list((output / "index").glob("*.idx")))


def test_two_engines_write_what_one_process_does(cluster: Cluster, alone: Alone, tmp_path: Path) -> None:
    data, expected = alone
    said = finish(start(data, tmp_path, cluster))
    assert f"{DOCUMENTS} sequences scored" in said and files_of(tmp_path) == expected
    again = finish(start(data, tmp_path, cluster))
    assert "0 sequences scored" in again and f"{DOCUMENTS} already stored" in again


def test_an_actor_that_is_killed_loses_nothing(cluster: Cluster, alone: Alone, tmp_path: Path) -> None:
    data, expected = alone
    process = start(data, tmp_path, cluster, *SLOW)
    wait_until(lambda: shards(tmp_path) >= 1)
    assert process.poll() is None and shards(tmp_path) < UNITS
    cluster.workers()[0].kill()
    said = finish(process)
    scored = int(said.split(" sequences scored")[0].rpartition(" ")[2])
    # At most the units that it had are scored again, and those are not counted twice.
    assert scored <= DOCUMENTS and files_of(tmp_path) == expected
    assert dataset_stats(Folder(str(tmp_path))).twice == 0


def test_a_driver_that_is_killed_and_started_again_loses_nothing(
    cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    data, expected = alone
    process = start(data, tmp_path, cluster, *SLOW)
    wait_until(lambda: shards(tmp_path) >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # Its actors end with it; what they were writing then is there whole or not at all.
    wait_until(lambda: not cluster.workers())
    there = dataset_stats(Folder(str(tmp_path))).documents
    assert 20 <= there < DOCUMENTS
    said = finish(start(data, tmp_path, cluster))
    assert f"{DOCUMENTS - there} sequences scored" in said and f"{there} already stored" in said
    assert files_of(tmp_path) == expected and list(check_dataset(Folder(str(tmp_path)))) == []


def test_a_node_that_goes_leaves_its_units_to_the_others_and_one_that_comes_is_used(
    alone: Alone, tmp_path: Path
) -> None:
    data, expected = alone
    output = tmp_path / "out"
    with Cluster(tmp_path, cpus=1) as cluster:
        wait_until(lambda: reached(cluster.address))
        node = cluster.add()
        process = start(data, output, cluster, "--script", '{"delay_s": 1.0}', "--window", "100")
        wait_until(lambda: process.poll() is not None or (cluster.workers(node) and shards(output) >= 1))
        assert process.poll() is None, "the fill was over before the second node had its engine"
        cluster.remove(node)
        before = shards(output)
        wait_until(lambda: shards(output) > before)
        cluster.add()
        finish(process)
    assert files_of(output) == expected


def test_an_engine_that_dies_of_a_document_again_and_again_ends_the_fill(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(f'{{"tokens": [{n}, {n + 1}]}}\n' for n in range(1, 40, 3)))
    process = start(tmp_path / "data.jsonl", tmp_path / "out", cluster, "--script", '{"die_token": 22}')
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 70 and "3 times on the same documents" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ray", "127.0.0.1:1"], "cannot reach a cluster"),
        (["--replicas", "2"], "it needs --ray ADDRESS"),
        (["--ray", "auto", "--replicas", "0"], "--replicas 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, more: list[str], message: str) -> None:
    write_data(tmp_path / "data.jsonl", 2)
    done = fill(tmp_path / "data.jsonl", tmp_path / "out", *more)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_an_engine_takes_a_gpu_for_each_of_its_ranks() -> None:
    from teacher_service.offline.ray_fill import gpus_of
    from teacher_service.settings import parse_settings

    assert gpus_of(parse_settings(["m"])) == 1
    assert gpus_of(parse_settings(["m", "--tensor-parallel-size", "4"])) == 4
    assert gpus_of(parse_settings(["m", "--tensor-parallel-size=2", "--pipeline-parallel-size", "3"])) == 6


@pytest.mark.vllm
def test_two_vllm_engines_write_what_one_does(cluster: Cluster, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    write_data(tmp_path / "data.jsonl", 20, length=20)
    words = ["fill", str(model), str(tmp_path / "data.jsonl"), "--dtype", "float32", *ASK, "--shard-tokens", "100",
             "--max-model-len", "64"]  # fmt: skip
    for output, more in (("one", []), ("two", ["--ray", cluster.address, "--replicas", "2"])):
        command = [sys.executable, "-m", "teacher_service.main", *words, "--output", str(tmp_path / output), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0 and "20 sequences scored" in done.stdout, done.stderr
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")

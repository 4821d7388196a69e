"""`fill --output URL --ray ADDRESS --replicas N`: one data set scored by engines on the nodes of a Ray cluster.

The driver reads the data and hands out units; N actors (`ray_worker.py`) score them and write shards, the same as a
single process would write. Ray restarts actors that were lost with their node or process, and starts those that no node
has room for once one joins; meanwhile the others take their units. Called by `fill_command.py`; needs `ray`.

These are actors of Ray Core, not a `map_batches` of Ray Data, whose actors can't be called before they are given data:
units depend on the teacher's limits and identity, so that one more engine would have to be loaded to know them.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.dataset.manifest import Manifest, versions
from teacher_proto.errors import EngineDeadError
from teacher_proto.info import TeacherInfo
from teacher_proto.process.stopping import StopSignals
from teacher_service.offline.dataset_fill import missing_units
from teacher_service.offline.fill import FillReport
from teacher_service.offline.fill_options import FillOptions
from teacher_service.offline.units import Unit
from teacher_service.settings import TeacherSettings

if TYPE_CHECKING:
    from teacher_service.offline.ray_worker import Filled

# Units that a worker has: one that it scores, and one to continue with while the first is written.
_AT_ONCE = 2
# How many engines may die of a unit, and how many workers may be lost with it, before the fill ends.
_DEATHS, _LOSSES = 3, 8
_POLL_S, _AGAIN_S = 1.0, 0.5


class RayCluster:
    """N workers of a fill on a cluster; leaving the block ends them. ValueError if there is no Ray or no cluster."""

    def __init__(self, options: FillOptions, signals: StopSignals):
        try:
            import ray
        except ImportError:
            raise ValueError("--ray needs the package ray: pip install 'stillhouse[ray]', on all nodes") from None
        self._ray, self._options, self._signals = ray, options, signals
        self._starting: dict[Any, Any] = {}  # calls that return once a worker's engine runs, and the workers
        self._free: list[Any] = []  # workers, once for each unit that they may be given
        self._again: list[Unit] = []
        self._deaths: dict[int, int] = {}

    def __enter__(self) -> RayCluster:
        from teacher_service.offline.ray_worker import FillWorker

        ray, own = self._ray, self._options.own
        check_reachable(own.ray)
        try:
            ray.init(address=own.ray, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"--ray {own.ray}: cannot reach a cluster ({reason}); start one with `ray start`"
            ) from None
        gpus = gpus_of(self._options.settings) if ray.cluster_resources().get("GPU") else 0
        actor = ray.remote(FillWorker).options(
            num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=0, max_concurrency=_AT_ONCE + 1
        )
        workers = [actor.remote(self._options.engine_arguments) for _ in range(own.replicas)]
        self._starting = {worker.teacher.remote(): worker for worker in workers}
        return self

    def __exit__(self, *what: object) -> None:
        self._ray.shutdown()

    def teacher(self) -> TeacherInfo:
        """The identity and limits of the teacher, from the first worker that has started."""
        while True:
            done, _ = self._ray.wait(list(self._starting), num_returns=1, timeout=_POLL_S)
            self._signals.check()
            if done:
                # It stays in `_starting`, so that `fill` finds it there.
                return TeacherInfo.model_validate_json(self._get(done[0]))

    def fill(self, info: TeacherInfo, units: Iterator[Unit], show: Callable[[FillReport], object]) -> FillReport:
        """Have the workers score the units of our part. EngineDeadError if a unit kills engine after engine."""
        options, report, began = self._options, FillReport(), time.monotonic()
        manifest = Manifest(info, options.request.spec, options.codec, versions())
        under_way: dict[Any, tuple[Unit, Any]] = {}
        with TargetDataset(options.own.output, create=manifest) as dataset:
            missing = missing_units(dataset, units, options.part, report, show)
            while True:
                while self._free and (unit := self._again.pop() if self._again else next(missing, None)) is not None:
                    worker = self._free.pop(0)
                    under_way[worker.fill.remote(options.own.output, manifest, unit)] = unit, worker
                if not under_way and not self._again and self._free:
                    break
                done, _ = self._ray.wait([*under_way, *self._starting], num_returns=1, timeout=_POLL_S)
                self._signals.check()
                for reference in done:
                    if reference in self._starting:
                        self._started(reference, info)
                    else:
                        self._finished(reference, *under_way.pop(reference), report)
                show(report)
        report.seconds = time.monotonic() - began
        return report

    def _started(self, reference: Any, info: TeacherInfo) -> None:
        """A worker has started, or was lost before it had: then wait for it again. ValueError for another teacher."""
        worker = self._starting.pop(reference)
        try:
            theirs = TeacherInfo.model_validate_json(self._get(reference))
        except self._ray.exceptions.RayActorError:
            time.sleep(_AGAIN_S)
            self._starting[worker.teacher.remote()] = worker
            return
        if theirs.fingerprint != info.fingerprint:
            lines = info.identity.difference(theirs.identity)
            raise ValueError(
                f"the nodes' engines are different teachers: {'; '.join(lines)}. Fill one dataset for each"
            )
        self._free += [worker] * _AT_ONCE

    def _finished(self, reference: Any, unit: Unit, worker: Any, report: FillReport) -> None:
        """A unit is done, or its engine or its whole worker has died: then the unit is handed out again."""
        try:
            filled: Filled = self._get(reference)
        except self._ray.exceptions.RayActorError as error:
            # Ray restarts it where there is room for it. Its other unit will be found lost in its turn.
            self._free = [one for one in self._free if one is not worker]
            if worker not in self._starting.values():
                self._starting[worker.teacher.remote()] = worker
            self._died(unit, str(error).strip().splitlines()[0], _LOSSES)
            return
        self._free.append(worker)
        add_report(report, filled.report)
        if filled.died:
            self._died(unit, filled.died, _DEATHS)

    def _died(self, unit: Unit, reason: str, most: int) -> None:
        self._deaths[unit.number] = self._deaths.get(unit.number, 0) + 1
        if self._deaths[unit.number] >= most:
            raise EngineDeadError(f"{reason}, {most} times on the same documents")
        self._again.append(unit)

    def _get(self, reference: Any) -> Any:
        """The result of a call; its error is raised as it was in the worker."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None


def check_reachable(address: str) -> None:
    """ValueError at once if nothing listens there; Ray would keep trying for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return  # auto, local, or a URL of Ray's own
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"--ray {address}: cannot reach a cluster ({error}); start one with `ray start --head`"
        ) from None


def gpus_of(settings: TeacherSettings) -> int:
    """GPUs that one engine takes: tensor-parallel ranks times pipeline stages."""
    words, gpus = shlex.split(settings.engine_args), 1
    for name in ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"):
        for place, word in enumerate(words):
            if word == name and place + 1 < len(words):
                gpus *= int(words[place + 1])
            elif word.startswith(f"{name}="):
                gpus *= int(word.partition("=")[2])
    return gpus


def add_report(total: FillReport, one: FillReport) -> None:
    total.scored += one.scored
    total.skipped += one.skipped
    total.failed += one.failed
    total.tokens += one.tokens
    total.bytes_done += one.bytes_done
    total.failures = [*total.failures, *one.failures][:10]

"""Federated jobs: takes them, runs them over any crash, tells how far they are.

Serves FederatedService. What a job does is decided by its planner (`workloads/federated.py`) and
done by its driver.
"""

# ruff: noqa: D102, N802 - gRPC methods are named and described by the protos

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import structlog

from scheduler.catalogue import FunctionCatalogue
from scheduler.federated_driver import ENDED_MAX, OPEN, JobDriver, Surroundings
from scheduler.store import federated as table
from scheduler.workloads.federated import planner_of
from scheduler.workloads.federated_events import Event, ResumeAsked, RoundOpened, StopAsked
from tierwise.clock import monotonic_s, wall_s
from tierwise.domain.federated import JobProgress, JobSpec, JobState, RoundRecord
from tierwise.domain.ids import NodeId
from tierwise.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    Overloaded,
    PermissionDenied,
    TierwiseError,
)
from tierwise.v1 import federated_pb2, federated_pb2_grpc, node_pb2
from tierwise.wire import checks
from tierwise.wire.convert_federated import (
    ROUNDS_MAX,
    job_spec_from_pb,
    job_to_pb,
    round_to_pb,
)
from tierwise.wire.identity import Identity, Role, peer_identity

log = structlog.get_logger()

RUNNING_MAX = 100  # jobs at a time
LISTED_MAX = 1000
ROUNDS_LISTED_MAX = 1000
_Name = tuple[str, str]  # namespace, job


class Federation(federated_pb2_grpc.FederatedServiceServicer):
    """Holds the drivers of the jobs that go on. Belongs to one event loop."""

    def __init__(
        self, around: Surroundings, functions: FunctionCatalogue, group: asyncio.TaskGroup
    ) -> None:
        """Serve.

        Args:
            around: What drivers work with.
            functions: What jobs may name.
            group: Owns the tasks of jobs.
        """
        self._around = around
        self._store = around.store
        self._functions = functions
        self._group = group
        self._drivers: dict[_Name, JobDriver] = {}
        self._tasks: dict[_Name, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()  # jobs are created, stopped and resumed one at a time
        self._listeners: dict[_Name, set[asyncio.Event]] = {}
        around.sessions.on_round_opened = self._round_opened

    async def resume(self) -> None:
        """Go on with the jobs that were running when the scheduler stopped."""
        for row in await self._store.read(table.running):
            try:
                self._drive(row, await self._newest_round(row.uid))
            except TierwiseError as error:  # for example, a function is gone
                log.error("federated.not_resumed", job=row.job, cause=str(error))
                message = f"it cannot go on: {error.message}"
                failed = replace(row.progress, state=JobState.FAILED, message=message)
                await self._write(row, failed)

    def close(self) -> None:
        """Let go of every job; what is on disk goes on at the next start."""
        for task in self._tasks.values():
            task.cancel()

    # -- RPCs -----------------------------------------------------------------------------------

    async def CreateJob(
        self, request: federated_pb2.CreateJobRequest, context: Any
    ) -> federated_pb2.CreateJobResponse:
        identity = peer_identity(context)
        spec = job_spec_from_pb(request.spec)
        blob = request.spec.SerializeToString(deterministic=True)
        for function in (spec.client_function, spec.aggregate_function, spec.evaluate_function):
            if function is not None:
                self._functions.find(function)
        async with self._changing:
            with suppress(NotFound):
                known = await self._row((spec.namespace, spec.job))
                if known.spec == blob and known.owner == identity.uri:
                    return federated_pb2.CreateJobResponse(job=_job(known))
                _check_owner(known, identity)
                if known.progress.state is JobState.RUNNING:
                    raise AlreadyExists(
                        f"another federated job {spec.namespace}/{spec.job} is running: stop it, "
                        "or choose another name"
                    )
            self._check_room()
            row = table.JobRow(
                namespace=spec.namespace,
                job=spec.job,
                uid=secrets.token_hex(6),
                owner=identity.uri,
                spec=blob,
                progress=JobProgress(round_count=spec.round_count),
                created_unix_s=wall_s(),
            )
            await self._store.write(lambda c: table.insert(c, row))
            self._drive(row, None)
        log.info("federated.created", namespace=spec.namespace, job=spec.job, owner=row.owner)
        return federated_pb2.CreateJobResponse(job=_job(row), is_new=True)

    async def ListJobs(
        self, request: federated_pb2.ListJobsRequest, context: Any
    ) -> federated_pb2.ListJobsResponse:
        limit = max(1, min(request.limit or 100, LISTED_MAX))
        rows = await self._store.read(lambda c: table.newest(c, request.namespace, limit))
        return federated_pb2.ListJobsResponse(jobs=map(_job, rows))

    async def GetJob(
        self, request: federated_pb2.GetJobRequest, context: Any
    ) -> federated_pb2.GetJobResponse:
        row = await self._row(_name(request.namespace, request.job))
        limit = max(1, min(request.round_limit or 100, ROUNDS_LISTED_MAX))
        rounds = await self._store.read(lambda c: table.newest_rounds(c, row.uid, limit))
        return federated_pb2.GetJobResponse(job=_job(row), rounds=rounds)

    async def WatchJob(  # type: ignore[override]  # grpc.aio also takes coroutines that write
        self, request: federated_pb2.WatchJobRequest, context: Any
    ) -> None:
        name = _name(request.namespace, request.job)
        seen = -1  # the newest round whose end was told
        last = None
        with self._listening(name) as changed:
            while True:
                changed.clear()
                row, rounds = await self._watched(name, seen)
                responses = [
                    federated_pb2.WatchJobResponse(job=_job(row), round=each) for each in rounds
                ]
                for response in responses or [federated_pb2.WatchJobResponse(job=_job(row))]:
                    if response.HasField("round"):
                        is_open = response.round.state in map(int, OPEN)
                        seen = response.round.round - is_open
                    if response != last:
                        last = response
                        await context.write(response)
                if row.progress.state is not JobState.RUNNING:
                    return
                await changed.wait()

    async def StopJob(
        self, request: federated_pb2.StopJobRequest, context: Any
    ) -> federated_pb2.StopJobResponse:
        name = _name(request.namespace, request.job)
        async with self._changing:
            row = await self._row(name)
            _check_owner(row, peer_identity(context))
            if row.progress.state is JobState.RUNNING:
                await self._tell(name, StopAsked())
            return federated_pb2.StopJobResponse(job=_job(await self._row(name)))

    async def ResumeJob(
        self, request: federated_pb2.ResumeJobRequest, context: Any
    ) -> federated_pb2.ResumeJobResponse:
        name = _name(request.namespace, request.job)
        count = checks.integer(request.round_count, "round_count", 0, ROUNDS_MAX)
        async with self._changing:
            row = await self._row(name)
            _check_owner(row, peer_identity(context))
            if row.progress.done_count >= (count or row.progress.round_count):
                raise FailedPrecondition(
                    f"all {row.progress.done_count} rounds of {row.namespace}/{row.job} are done: "
                    "ask for more"
                )
            if name not in self._drivers:
                self._check_room()
                self._drive(row, None)
            await self._tell(name, ResumeAsked(round_count=count))
            return federated_pb2.ResumeJobResponse(job=_job(await self._row(name)))

    # -- inside ---------------------------------------------------------------------------------

    def _drive(self, row: table.JobRow, newest: RoundRecord | None) -> None:
        """Begin to run a job.

        Raises:
            NotFound: Its aggregate function is gone.
            InvalidArgument: It was stored by another version.
        """
        spec: JobSpec = job_spec_from_pb(federated_pb2.FederatedJobSpec.FromString(row.spec))
        planner = planner_of(
            spec,
            self._functions.find(spec.aggregate_function),
            row.progress,
            uid=row.uid,
            unix_offset_s=wall_s() - monotonic_s(),
            current=newest if newest is not None and newest.state in OPEN else None,
        )
        driver = JobDriver(row, planner, self._around, newest)
        name = (row.namespace, row.job)
        driver.on_changed = lambda: self._notify(name)
        self._drivers[name] = driver

        async def run() -> None:
            try:
                await driver.run()
            finally:
                if self._drivers.get(name) is driver:
                    del self._drivers[name]
                    self._tasks.pop(name, None)
                self._notify(name)

        self._tasks[name] = self._group.create_task(run())

    async def _tell(self, name: _Name, event: Event) -> None:
        """Give a job an event; it may have ended meanwhile."""
        driver = self._drivers.get(name)
        if driver is not None:
            await driver.ask(event)

    def _round_opened(self, node_id: NodeId, message: node_pb2.RoundOpened) -> None:
        driver = self._drivers.get((message.namespace, message.job))
        if driver is not None:
            driver.feed(
                RoundOpened(
                    node_id=node_id,
                    round=message.round,
                    error_code=message.error_code,
                    message=message.message,
                )
            )

    async def _row(self, name: _Name) -> table.JobRow:
        """Return a job as it stands.

        Raises:
            NotFound: There is none of that name.
        """
        driver = self._drivers.get(name)
        if driver is not None:
            return driver.row
        return await self._store.read(lambda c: table.get(c, *name))

    async def _newest_round(self, uid: str) -> RoundRecord | None:
        return await self._store.read(lambda c: table.newest_round(c, uid))

    async def _watched(
        self, name: _Name, seen: int
    ) -> tuple[table.JobRow, list[federated_pb2.FederatedRound]]:
        """Return a job, and its rounds since the one that was `seen`; −1: only the newest."""
        driver = self._drivers.get(name)
        if driver is not None:
            return driver.row, [round_to_pb(each) for each in driver.rounds_since(seen)]
        row = await self._store.read(lambda c: table.get(c, *name))
        limit = 1 if seen < 0 else ENDED_MAX
        rounds = await self._store.read(lambda c: table.newest_rounds(c, row.uid, limit))
        return row, [each for each in rounds if each.round > seen]

    async def _write(self, row: table.JobRow, progress: JobProgress) -> None:
        now_unix_s = wall_s()
        await self._store.write(
            lambda c: table.save(c, self._store, row.uid, progress, None, now_unix_s)
        )

    def _check_room(self) -> None:
        if len(self._drivers) >= RUNNING_MAX:
            raise Overloaded(
                f"{RUNNING_MAX} federated jobs are running; wait until one has ended",
                retry_after_s=10.0,
            )

    @contextmanager
    def _listening(self, name: _Name) -> Iterator[asyncio.Event]:
        changed = asyncio.Event()
        listeners = self._listeners.setdefault(name, set())
        listeners.add(changed)
        try:
            yield changed
        finally:
            listeners.discard(changed)
            if not listeners:
                self._listeners.pop(name, None)

    def _notify(self, name: _Name) -> None:
        for changed in self._listeners.get(name, ()):
            changed.set()


def _job(row: table.JobRow) -> federated_pb2.FederatedJob:
    return job_to_pb(
        federated_pb2.FederatedJobSpec.FromString(row.spec),
        row.progress,
        owner=row.owner,
        created_unix_s=row.created_unix_s,
        ended_unix_s=row.ended_unix_s,
    )


def _name(namespace: str, job: str) -> _Name:
    return checks.name(namespace or "default", "namespace"), checks.name(job, "job")


def _check_owner(row: table.JobRow, identity: Identity) -> None:
    """Let its owner and administrators change a job.

    Raises:
        PermissionDenied: It is somebody else's.
    """
    if identity.role is not Role.ADMIN and identity.uri != row.owner:
        raise PermissionDenied(
            f"the federated job {row.namespace}/{row.job} is of {row.owner}; you are {identity.uri}"
        )

"""The statements of federated jobs: one row of each name, and its rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from sqlalchemy import Connection, Row, delete, func, select, update

from scheduler.store.store import Store
from scheduler.store.tables import federated_jobs as jobs
from scheduler.store.tables import federated_rounds as rounds
from tierwise.domain.federated import JobProgress, JobState, RoundRecord
from tierwise.errors import NotFound
from tierwise.v1 import federated_pb2
from tierwise.wire.convert_federated import round_from_pb, round_to_pb

ENDED_KEPT_MAX = 1000
ROUNDS_KEPT_MAX = 1000  # of each job, the newest


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A job as it is stored."""

    namespace: str
    job: str
    uid: str
    owner: str
    spec: bytes
    progress: JobProgress
    created_unix_s: float
    ended_unix_s: float = 0.0


def insert(connection: Connection, row: JobRow) -> None:
    """Store a job in the place of one of its name, whose rounds are forgotten."""
    where = (jobs.c.namespace == row.namespace) & (jobs.c.job == row.job)
    older = select(jobs.c.uid).where(where)
    connection.execute(delete(rounds).where(rounds.c.uid.in_(older)))
    connection.execute(delete(jobs).where(where))
    connection.execute(
        jobs.insert().values(
            namespace=row.namespace,
            job=row.job,
            uid=row.uid,
            owner=row.owner,
            spec=row.spec,
            created_unix_s=row.created_unix_s,
            ended_unix_s=row.ended_unix_s,
            **_progress(row.progress),
        )
    )
    _prune(connection)


def save(
    connection: Connection,
    store: Store,
    uid: str,
    progress: JobProgress,
    record: RoundRecord | None,
    now_unix_s: float,
) -> float:
    """Write how far a job is, and a round of it; return when it ended, 0 while it goes on."""
    ended_unix_s = 0.0 if progress.state is JobState.RUNNING else now_unix_s
    values = {**_progress(progress), "ended_unix_s": ended_unix_s}
    connection.execute(update(jobs).where(jobs.c.uid == uid).values(**values))
    if record is not None:
        blob = round_to_pb(record).SerializeToString()
        insert = store.insert(rounds).values(uid=uid, round=record.round, record=blob)
        keys = ["uid", "round"]
        connection.execute(insert.on_conflict_do_update(index_elements=keys, set_={"record": blob}))
        too_old = rounds.c.round <= record.round - ROUNDS_KEPT_MAX
        connection.execute(delete(rounds).where(rounds.c.uid == uid).where(too_old))
    return ended_unix_s


def get(connection: Connection, namespace: str, job: str) -> JobRow:
    """Return a job.

    Raises:
        NotFound: There is none of that name.
    """
    where = (jobs.c.namespace == namespace) & (jobs.c.job == job)
    row = connection.execute(select(jobs).where(where)).first()
    if row is None:
        raise NotFound(
            f"there is no federated job {namespace}/{job}; `tierwise fl list` lists what there is"
        )
    return _row(row)


def newest(connection: Connection, namespace: str, limit: int) -> list[JobRow]:
    """Return jobs, newest first."""
    query = select(jobs).order_by(jobs.c.created_unix_s.desc()).limit(limit)
    if namespace:
        query = query.where(jobs.c.namespace == namespace)
    return [_row(row) for row in connection.execute(query)]


def running(connection: Connection) -> list[JobRow]:
    """Return the jobs that go on, oldest first."""
    query = select(jobs).where(jobs.c.state == int(JobState.RUNNING))
    return [_row(row) for row in connection.execute(query.order_by(jobs.c.created_unix_s))]


def newest_rounds(
    connection: Connection, uid: str, limit: int
) -> list[federated_pb2.FederatedRound]:
    """Return the newest rounds of a job, ascending."""
    query = select(rounds.c.record).where(rounds.c.uid == uid)
    blobs: Sequence[bytes] = connection.scalars(
        query.order_by(rounds.c.round.desc()).limit(limit)
    ).all()
    return [federated_pb2.FederatedRound.FromString(bytes(blob)) for blob in reversed(blobs)]


def newest_round(connection: Connection, uid: str) -> RoundRecord | None:
    """Return the newest round of a job, if it has one."""
    found = newest_rounds(connection, uid, 1)
    return round_from_pb(found[0]) if found else None


def _progress(progress: JobProgress) -> dict[str, object]:
    return {"state": int(progress.state), "progress": msgspec.json.encode(progress).decode()}


def _row(row: Row[tuple[object, ...]]) -> JobRow:
    return JobRow(
        namespace=row.namespace,
        job=row.job,
        uid=row.uid,
        owner=row.owner,
        spec=bytes(row.spec),
        progress=msgspec.json.decode(row.progress, type=JobProgress),
        created_unix_s=row.created_unix_s,
        ended_unix_s=row.ended_unix_s,
    )


def _prune(connection: Connection) -> None:
    """Forget the jobs that ended first, when there are too many."""
    ended = jobs.c.state != int(JobState.RUNNING)
    count = connection.scalar(select(func.count()).select_from(jobs).where(ended)) or 0
    if count <= ENDED_KEPT_MAX:
        return
    query = select(jobs.c.uid).where(ended).order_by(jobs.c.ended_unix_s)
    uids = list(connection.scalars(query.limit(count - ENDED_KEPT_MAX)))
    connection.execute(delete(rounds).where(rounds.c.uid.in_(uids)))
    connection.execute(delete(jobs).where(jobs.c.uid.in_(uids)))

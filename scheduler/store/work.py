"""The statements of durable work. Changes are conditional on the state and fenced by the lease."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, func, or_, select, update

from scheduler.store.tables import payloads, results, work
from tierwise.errors import AlreadyExists, FailedPrecondition, NotFound
from tierwise.v1 import types_pb2, work_pb2

QUEUED = int(work_pb2.WORK_STATE_QUEUED)
LEASED = int(work_pb2.WORK_STATE_LEASED)
SUCCEEDED = int(work_pb2.WORK_STATE_SUCCEEDED)
FAILED = int(work_pb2.WORK_STATE_FAILED)
CANCELLED = int(work_pb2.WORK_STATE_CANCELLED)
DEAD = int(work_pb2.WORK_STATE_DEAD)
OPEN = (QUEUED, LEASED)
PRUNED_AT_ONCE_MAX = 1000

Accepted = tuple[str, bool]  # request id, whether it is new


def insert(
    connection: Connection, rows: Sequence[dict[str, Any]], arguments: Sequence[bytes]
) -> list[Accepted]:
    """Store what is not known yet; return what each row is known as, in order.

    Args:
        connection: Of a write.
        rows: One value per column of `work`, all from the same submitter.
        arguments: The payloads, in the same order.

    Raises:
        AlreadyExists: A key or id is in use with other content.
    """
    by_key, by_id = _known(connection, rows)
    accepted: list[Accepted] = []
    new_rows, new_payloads = [], []
    for row, blob in zip(rows, arguments, strict=True):
        content = (row["request_id"], row["content_digest"])
        known = by_key.get(row["idempotency_key"]) or by_id.get(row["request_id"])
        if known is None:
            by_key[row["idempotency_key"]] = by_id[row["request_id"]] = content
            new_rows.append(row)
            new_payloads.append({"request_id": row["request_id"], "arguments": blob})
            accepted.append((row["request_id"], True))
        elif known[1] == row["content_digest"]:
            accepted.append((known[0], False))
        elif row["idempotency_key"] in by_key:
            raise AlreadyExists(
                f"the key {row['idempotency_key']!r} was used for other work ({known[0]}); "
                "choose another"
            )
        else:
            raise AlreadyExists(f"there is other work with the id {row['request_id']!r}")
    if new_rows:
        connection.execute(work.insert(), new_rows)
        connection.execute(payloads.insert(), new_payloads)
    return accepted


_Known = dict[str, tuple[str, str]]  # key or id → id, content digest


def _known(connection: Connection, rows: Sequence[dict[str, Any]]) -> tuple[_Known, _Known]:
    ids = [row["request_id"] for row in rows]
    keys = [row["idempotency_key"] for row in rows]
    submitter = rows[0]["submitted_by"]
    query = select(
        work.c.request_id, work.c.idempotency_key, work.c.content_digest, work.c.submitted_by
    )
    of_submitter = (work.c.submitted_by == submitter) & work.c.idempotency_key.in_(keys)
    by_key: _Known = {}
    by_id: _Known = {}
    for row in connection.execute(query.where(or_(work.c.request_id.in_(ids), of_submitter))):
        content = (row.request_id, row.content_digest)
        if row.submitted_by == submitter:
            by_key[row.idempotency_key] = content
            by_id[row.request_id] = content
        else:  # somebody else's id: never equal, so that nobody can read another's work by guessing
            by_id[row.request_id] = (row.request_id, "")
    return by_key, by_id


def known_count(connection: Connection, rows: Sequence[dict[str, Any]]) -> int:
    """Return how many of the rows are stored already."""
    by_key, by_id = _known(connection, rows)
    return sum(row["idempotency_key"] in by_key or row["request_id"] in by_id for row in rows)


def lease(
    connection: Connection, request_id: str, token: int, node_id: str, attempt: int
) -> bytes | None:
    """Give the work to a node if `token` is the highest yet; return its arguments, or None.

    `attempt` counts this one: 1 for the first.
    """
    done = connection.execute(
        update(work)
        .where(work.c.request_id == request_id)
        .where(work.c.lease < token)
        .where(work.c.state.in_(OPEN))
        .values(state=LEASED, lease=token, node_id=node_id, attempt_count=attempt)
    )
    if not done.rowcount:
        return None
    query = select(payloads.c.arguments).where(payloads.c.request_id == request_id)
    return bytes(connection.execute(query).scalar_one())


def requeue(connection: Connection, request_id: str, attempt_count: int, message: str) -> None:
    """Note that the work waits again after `attempt_count` attempts that failed.

    An attempt that never ran (refused, expired in a queue) or whose node was lost is taken back.
    """
    connection.execute(
        update(work)
        .where(work.c.request_id == request_id)
        .where(work.c.state.in_(OPEN))
        .values(state=QUEUED, attempt_count=attempt_count, message=message)
    )


def end(
    connection: Connection,
    state: int,
    result: types_pb2.InvocationResult,
    *,
    ended_unix_s: float,
    from_node: str | None = None,
) -> str | None:
    """Record how the work ended, once; return its submitter, or None if that is known already.

    Only the newest lease's result counts; `from_node`, if given, must be the node that has it.
    """
    outcome = result.outcome
    statement = (
        update(work)
        .where(work.c.request_id == result.request_id)
        .where(work.c.lease == outcome.lease)
        .where(work.c.state.in_(OPEN))
        .values(state=state, message=outcome.message, ended_unix_s=ended_unix_s)
    )
    if from_node is not None:
        statement = statement.where(work.c.node_id == from_node)
    row = connection.execute(statement.returning(work.c.submitted_by)).first()
    if row is None:
        return None
    blob = result.SerializeToString()
    connection.execute(results.insert().values(request_id=result.request_id, result=blob))
    if state != DEAD:
        connection.execute(delete(payloads).where(payloads.c.request_id == result.request_id))
    return str(row.submitted_by)


def revive(connection: Connection, request_id: str, position: int, now_unix_s: float) -> None:
    """Queue dead-lettered work again, as if it were submitted now.

    Raises:
        NotFound: There is no such work.
        FailedPrecondition: It is not dead-lettered.
    """
    done = connection.execute(
        update(work)
        .where(work.c.request_id == request_id)
        .where(work.c.state == DEAD)
        .values(
            state=QUEUED,
            position=position,
            attempt_count=0,
            message="redriven",
            submitted_unix_s=now_unix_s,
            ended_unix_s=0.0,
        )
    )
    if not done.rowcount:
        get(connection, request_id)
        raise FailedPrecondition(
            f"work {request_id} is not dead-lettered; only that can be redriven"
        )
    connection.execute(delete(results).where(results.c.request_id == request_id))


def get(connection: Connection, request_id: str) -> Row[Any]:
    """Return one row of `work`.

    Raises:
        NotFound: There is none.
    """
    row = connection.execute(select(work).where(work.c.request_id == request_id)).first()
    if row is None:
        raise NotFound(f"there is no work {request_id!r}; `tierwise get work` lists what there is")
    return row


def get_with_result(connection: Connection, request_id: str) -> tuple[Row[Any], bytes | None]:
    """Return one row of `work`, and the result if there is one.

    Raises:
        NotFound: There is no such work.
    """
    row = get(connection, request_id)
    if row.state in OPEN:
        return row, None
    query = select(results.c.result).where(results.c.request_id == request_id)
    return row, connection.execute(query).scalar()


def newest(connection: Connection, state: int, limit: int) -> Sequence[Row[Any]]:
    """Return rows of `work`, newest first; state 0 means all."""
    query = select(work).order_by(work.c.position.desc()).limit(limit)
    if state:
        query = query.where(work.c.state == state)
    return connection.execute(query).all()


def oldest(connection: Connection, state: int, after: int, limit: int) -> Sequence[Row[Any]]:
    """Return rows of `work` in one state whose position is over `after`, in order."""
    query = select(work).where(work.c.state == state).where(work.c.position > after)
    return connection.execute(query.order_by(work.c.position).limit(limit)).all()


def open_count_and_last_position(connection: Connection) -> tuple[int, int]:
    """Return how much work has not ended, and the highest position given out."""
    open_count = select(func.count()).select_from(work).where(work.c.state.in_(OPEN))
    last = connection.scalar(select(func.max(work.c.position))) or 0
    return connection.scalar(open_count) or 0, last


def prune(connection: Connection, before_unix_s: float, kept_max: int) -> int:
    """Remove ended work, oldest first, a bounded number at a time; return how much.

    What ended before a time goes, and what is over `kept_max` in number; dead letters count too.
    """
    ended = work.c.state.not_in(OPEN)
    count = connection.scalar(select(func.count()).select_from(work).where(ended)) or 0
    query = select(work.c.request_id).where(ended).order_by(work.c.ended_unix_s)
    if count <= kept_max:
        query = query.where(work.c.ended_unix_s < before_unix_s)
        limit = PRUNED_AT_ONCE_MAX
    else:
        limit = min(PRUNED_AT_ONCE_MAX, count - kept_max)
    ids = list(connection.scalars(query.limit(limit)))
    if ids:
        for table in (work, payloads, results):
            connection.execute(delete(table).where(table.c.request_id.in_(ids)))
    return len(ids)

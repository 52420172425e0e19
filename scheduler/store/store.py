"""The engine: reads in threads, writes through one thread that commits many at a time."""

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection, Engine, create_engine, event, inspect, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from scheduler.store.tables import MIGRATIONS, SCHEMA_VERSION, meta, metadata
from tierwise.errors import FailedPrecondition, Overloaded, TierwiseError, Unavailable

log = structlog.get_logger()
T = TypeVar("T")

WRITES_MAX = 20_000  # waiting
BATCH_MAX = 1000  # writes in one transaction
READERS_MAX = 4  # threads and connections that read


@dataclass(slots=True)
class _Write:
    action: Callable[[Connection], Any]
    done: "asyncio.Future[Any]"
    on_stored: Callable[[Any], None] | None


_Result = tuple[Any, BaseException | None]


class Store:
    """A database that the event loop never waits for.

    A `write` is durable when it returns: SQLite in WAL mode with synchronous=FULL syncs at each
    commit, and writes that arrive while one commit is under way share the next one. Belongs to one
    event loop.
    """

    def __init__(self, url: str) -> None:
        """Open the database at a SQLAlchemy URL and make its tables.

        Raises:
            FailedPrecondition: It was made by another version of tierwise.
            Unavailable: It cannot be opened.
        """
        try:
            self._engine = _engine(url)
            with self._engine.begin() as connection:
                _check_schema(connection)
        except (SQLAlchemyError, ImportError) as error:
            raise Unavailable(
                f"the database {_without_password(url)} cannot be opened: {error}"
            ) from None
        self._queue: queue.Queue[_Write | None] = queue.Queue(maxsize=WRITES_MAX)
        self._readers = asyncio.Semaphore(READERS_MAX)
        self._loop: asyncio.AbstractEventLoop | None = None
        # A daemon thread: a process that fails to start must not hang on it.
        self._thread = threading.Thread(
            target=self._write_forever, name="store-writer", daemon=True
        )
        self._thread.start()

    def insert(self, table: Any) -> Any:
        """Return an INSERT of the dialect, which knows on_conflict_do_update/nothing."""
        is_sqlite = self._engine.dialect.name == "sqlite"
        return (sqlite if is_sqlite else postgresql).insert(table)

    async def write(
        self,
        action: Callable[[Connection], T],
        *,
        on_stored: Callable[[T], None] | None = None,
    ) -> T:
        """Run `action` in the next transaction; return its result once that is on disk.

        An action that raises is rolled back alone; the others of the batch stay. It may run again
        after a rollback, so it must do nothing but use its connection.

        Args:
            action: Statements of one unit.
            on_stored: Called on the event loop right after the commit, in the order of commits,
                also if whoever waits for this call has been cancelled: what is in memory follows
                what is on disk.

        Raises:
            Overloaded: Too many writes wait already.
            Unavailable: The disk is full or the database failed; nothing was written.
        """
        loop = self._loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        try:
            self._queue.put_nowait(_Write(action, done, on_stored))
        except queue.Full:
            raise Overloaded(
                f"{WRITES_MAX} writes wait for the database; send more slowly", retry_after_s=1.0
            ) from None
        return await done

    async def read(self, action: Callable[[Connection], T]) -> T:
        """Run a read-only `action` in a thread.

        Raises:
            Unavailable: The database failed.
        """
        async with self._readers:
            return await asyncio.to_thread(self.read_now, action)

    def read_now(self, action: Callable[[Connection], T]) -> T:
        """Run a read-only `action` in this thread; for start-up.

        Raises:
            Unavailable: The database failed.
        """
        try:
            with self._engine.connect() as connection:
                return action(connection)
        except SQLAlchemyError as error:
            raise Unavailable(
                f"the database could not read: {_cause(error)}", retry_after_s=1.0
            ) from None

    async def close(self) -> None:
        """Finish what is queued and close."""
        await asyncio.to_thread(self._queue.put, None)
        await asyncio.to_thread(self._thread.join)
        self._engine.dispose()

    def _write_forever(self) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            batch = [first]
            is_last = False
            while len(batch) < BATCH_MAX:
                try:
                    write = self._queue.get_nowait()
                except queue.Empty:
                    break
                if write is None:
                    is_last = True
                    break
                batch.append(write)
            assert self._loop is not None
            results = self._commit(batch)
            try:
                self._loop.call_soon_threadsafe(_resolve, batch, results)
            except RuntimeError:
                return  # the loop has ended, nobody waits any more
            if is_last:
                return

    def _commit(self, batch: list[_Write]) -> list[_Result]:
        """Run a batch in one transaction, so that a write that fails takes no other with it.

        Savepoints cost half the speed: they are used only if a write of the batch was refused. If
        the database itself fails, each write runs alone, which shows whose fault it was.
        """
        if len(batch) == 1:
            return [self._commit_one(batch[0])]
        try:
            try:
                with self._engine.begin() as connection:
                    return [(write.action(connection), None) for write in batch]
            except TierwiseError:
                with self._engine.begin() as connection:
                    return [_run_nested(write, connection) for write in batch]
        except Exception:
            return [self._commit_one(write) for write in batch]

    def _commit_one(self, write: _Write) -> _Result:
        try:
            with self._engine.begin() as connection:
                return write.action(connection), None
        except TierwiseError as error:
            return None, error
        except SQLAlchemyError as error:
            log.error("store.write_failed", cause=_cause(error))
            message = f"the database could not write: {_cause(error)}; nothing was stored"
            return None, Unavailable(message, retry_after_s=1.0)
        except Exception as error:
            log.exception("store.crashed")  # a bug in the action, for its caller to report
            return None, error


def _run_nested(write: _Write, connection: Connection) -> _Result:
    try:
        with connection.begin_nested():
            return write.action(connection), None
    except TierwiseError as error:
        return None, error


def _resolve(batch: list[_Write], results: list[_Result]) -> None:
    for write, (value, problem) in zip(batch, results, strict=True):
        if problem is None and write.on_stored is not None:
            try:
                write.on_stored(value)
            except Exception as error:
                log.exception("store.crashed")
                problem = error
        if write.done.done():  # the caller was cancelled
            continue
        if problem is not None:
            write.done.set_exception(problem)
        else:
            write.done.set_result(value)


def _engine(url: str) -> Engine:
    """Return an engine; all that differs between the two dialects is here and in `insert`."""
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, pool_size=READERS_MAX + 1)
    engine = create_engine(url, pool_size=READERS_MAX + 1)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, so that savepoints work
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _check_schema(connection: Connection) -> None:
    """Make the tables in an empty database, bring an older one up to date, in one transaction.

    One of a later version, or too old to know the way, is refused and left as it is.
    """
    if inspect(connection).has_table(meta.name):
        found = connection.scalar(select(meta.c.value).where(meta.c.key == "schema"))
        version = int(found) if found is not None else 0
        steps = range(version, SCHEMA_VERSION)
        if version > SCHEMA_VERSION or not all(step in MIGRATIONS for step in steps):
            raise FailedPrecondition(
                f"the database has schema {found}, this tierwise needs {SCHEMA_VERSION}: run the "
                "version that made it, or start with a fresh state folder"
            )
        for step in steps:
            log.info("store.migrated", from_schema=step, to_schema=step + 1)
            for statement in MIGRATIONS[step]:
                connection.execute(text(statement))
        if steps:
            found_row = update(meta).where(meta.c.key == "schema")
            connection.execute(found_row.values(value=str(SCHEMA_VERSION)))
    metadata.create_all(connection)
    if connection.scalar(select(meta.c.value).where(meta.c.key == "schema")) is None:
        connection.execute(meta.insert().values(key="schema", value=str(SCHEMA_VERSION)))


def _cause(error: SQLAlchemyError) -> str:
    """Return the database's own words, without the statement and its values."""
    return str(error.orig) if isinstance(error, DBAPIError) else str(error)


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"

"""The engine: reads in threads, writes through one thread that commits many at a time."""

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection, create_engine, event, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from scheduler.store.tables import SCHEMA_VERSION, meta, metadata
from tierwise.errors import FailedPrecondition, Overloaded, TierwiseError, Unavailable

log = structlog.get_logger()
T = TypeVar("T")

WRITES_MAX = 20_000  # waiting
BATCH_MAX = 1000  # writes in one transaction


@dataclass(slots=True)
class _Write:
    action: Callable[[Connection], Any]
    done: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop


class Store:
    """A database that the event loop never waits for.

    A `write` is durable when it returns: SQLite in WAL mode with synchronous=FULL syncs at each
    commit, and writes that arrive while one commit is under way share the next one.
    """

    def __init__(self, url: str) -> None:
        """Open the database at a SQLAlchemy URL and make its tables.

        Raises:
            FailedPrecondition: It was made by another version of tierwise.
            Unavailable: It cannot be opened.
        """
        self._engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        self.is_sqlite = self._engine.dialect.name == "sqlite"
        if self.is_sqlite:
            event.listen(self._engine, "connect", _set_up_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        try:
            with self._engine.begin() as connection:
                metadata.create_all(connection)
                found = connection.scalar(select(meta.c.value).where(meta.c.key == "schema"))
                if found is None:
                    connection.execute(meta.insert().values(key="schema", value=str(SCHEMA_VERSION)))
        except SQLAlchemyError as error:
            raise Unavailable(f"the database {url} cannot be opened: {error}") from None
        if found not in (None, str(SCHEMA_VERSION)):
            raise FailedPrecondition(
                f"the database has schema {found}, this tierwise needs {SCHEMA_VERSION}: run the "
                "version that made it, or start with a fresh state folder"
            )
        self._queue: queue.Queue[_Write | None] = queue.Queue(maxsize=WRITES_MAX)
        self._thread = threading.Thread(target=self._write_forever, name="store-writer")
        self._thread.start()

    def insert(self, table: Any) -> Any:
        """Return an INSERT of the dialect, which knows on_conflict_do_update/nothing."""
        return (sqlite if self.is_sqlite else postgresql).insert(table)

    async def write(self, action: Callable[[Connection], T]) -> T:
        """Run `action` in the next transaction; return its result once that is on disk.

        An action that raises is rolled back alone; the others of the batch stay.

        Raises:
            Overloaded: Too many writes wait already.
            Unavailable: The disk is full or the database failed; nothing was written.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        try:
            self._queue.put_nowait(_Write(action, done, loop))
        except queue.Full:
            raise Overloaded(
                f"{WRITES_MAX} writes wait for the database; send more slowly", retry_after_s=1.0
            ) from None
        return await done

    async def read(self, action: Callable[[Connection], T]) -> T:
        """Run a read-only `action` in a thread."""

        def run() -> T:
            with self._engine.connect() as connection:
                return action(connection)

        return await asyncio.to_thread(run)

    def read_now(self, action: Callable[[Connection], T]) -> T:
        """Run a read-only `action` in this thread; for start-up."""
        with self._engine.connect() as connection:
            return action(connection)

    async def close(self) -> None:
        """Finish what is queued and close."""
        self._queue.put(None)
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
            self._commit(batch)
            if is_last:
                return

    def _commit(self, batch: list[_Write]) -> None:
        results: list[tuple[Any, BaseException | None]] = []
        try:
            with self._engine.begin() as connection:
                for write in batch:
                    try:
                        with connection.begin_nested():
                            results.append((write.action(connection), None))
                    except TierwiseError as error:
                        results.append((None, error))
        except SQLAlchemyError as error:
            log.error("store.write_failed", cause=str(error), write_count=len(batch))
            cause = str(error.orig) if isinstance(error, OperationalError) else str(error)
            failure = Unavailable(
                f"the database could not write: {cause}; nothing was stored", retry_after_s=1.0
            )
            results = [(None, failure)] * len(batch)
        except Exception as error:  # a bug in one action: nobody may wait for ever
            log.exception("store.crashed")
            results = [(None, error)] * len(batch)
        for write, (value, problem) in zip(batch, results, strict=True):
            write.loop.call_soon_threadsafe(_resolve, write.done, value, problem)


def _resolve(done: "asyncio.Future[Any]", value: Any, problem: BaseException | None) -> None:
    if done.done():  # the caller was cancelled
        return
    if problem is not None:
        done.set_exception(problem)
    else:
        done.set_result(value)


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, so that savepoints work
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")

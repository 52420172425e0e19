"""The store: group commit, isolation of failures, and what survives."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, event, func, select, text
from sqlalchemy.dialects import postgresql

from scheduler.store import store as module
from scheduler.store.store import Store
from scheduler.store.tables import SCHEMA_VERSION, meta, metadata
from tierwise.errors import FailedPrecondition, InvalidArgument, Overloaded, Unavailable


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'scheduler.db'}"


def put(key: str, value: str = "v"):
    return lambda connection: connection.execute(meta.insert().values(key=key, value=value))


def count(connection: Connection) -> int:
    return connection.scalar(select(func.count()).select_from(meta)) or 0


async def test_a_write_that_returned_is_there_for_another_connection(tmp_path: Path) -> None:
    store = Store(url(tmp_path))
    await store.write(put("a"))
    other = create_engine(url(tmp_path))
    with other.connect() as connection:
        assert connection.scalar(select(meta.c.value).where(meta.c.key == "a")) == "v"
    other.dispose()
    await store.close()


async def test_writes_that_arrive_together_share_a_commit(tmp_path: Path) -> None:
    store = Store(url(tmp_path))
    commits = 0

    def committed(_connection: Connection) -> None:
        nonlocal commits
        commits += 1

    event.listen(store._engine, "commit", committed)
    await asyncio.gather(*(store.write(put(f"k{i}")) for i in range(500)))
    assert await store.read(count) == 501
    assert commits < 50
    await store.close()


async def test_a_write_that_is_refused_takes_no_other_with_it(tmp_path: Path) -> None:
    store = Store(url(tmp_path))

    def refuse(connection: Connection) -> None:
        put("half")(connection)
        raise InvalidArgument("no")

    def bug(connection: Connection) -> None:
        put("buggy")(connection)
        raise ZeroDivisionError

    def twice(connection: Connection) -> None:
        put("once")(connection)
        put("once")(connection)

    writes = [put("a"), refuse, put("b"), bug, twice, put("c")]
    results = await asyncio.gather(*map(store.write, writes), return_exceptions=True)
    assert [type(r).__name__ for r in results if isinstance(r, BaseException)] == [
        "InvalidArgument",
        "ZeroDivisionError",
        "Unavailable",
    ]
    keys = await store.read(lambda c: set(c.scalars(select(meta.c.key))))
    assert keys == {"schema", "a", "b", "c"}
    await store.close()


async def test_a_full_disk_is_a_typed_error_and_stores_nothing_of_the_write(tmp_path: Path) -> None:
    store = Store(url(tmp_path))
    pages = await store.write(lambda c: c.scalar(text("PRAGMA page_count")))
    await store.write(lambda c: c.execute(text(f"PRAGMA max_page_count = {pages + 8}")))

    def large(connection: Connection) -> None:
        put("small")(connection)
        put("large", "x" * 1_000_000)(connection)

    with pytest.raises(Unavailable, match="full") as failure:
        await store.write(large)
    assert failure.value.retry_after_s
    assert await store.read(count) == 1
    await store.write(put("fits"))
    await store.close()


async def test_a_database_that_somebody_else_locks_is_unavailable_not_stuck(tmp_path: Path) -> None:
    store = Store(url(tmp_path))
    await store.write(lambda c: c.execute(text("PRAGMA busy_timeout = 50")))
    other = create_engine(url(tmp_path), isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.execute(text("BEGIN IMMEDIATE"))
        with pytest.raises(Unavailable, match="locked"):
            await store.write(put("a"))
        connection.execute(text("ROLLBACK"))
    await store.write(put("a"))
    other.dispose()
    await store.close()


async def test_a_writer_that_cannot_keep_up_says_overloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITES_MAX", 3)
    store = Store(url(tmp_path))
    started, go = threading.Event(), threading.Event()

    def slow(_connection: Connection) -> None:
        started.set()
        go.wait(10)

    first = asyncio.ensure_future(store.write(slow))
    await asyncio.to_thread(started.wait, 10)
    waiting = [asyncio.ensure_future(store.write(put(f"k{i}"))) for i in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refusal:
        await store.write(put("one too many"))
    assert refusal.value.retry_after_s
    go.set()
    await asyncio.gather(first, *waiting)
    await store.close()


def test_a_database_of_another_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    engine = create_engine(url(tmp_path))
    with engine.begin() as connection:
        meta.create(connection)
        connection.execute(meta.insert().values(key="schema", value=str(SCHEMA_VERSION + 1)))
    with pytest.raises(FailedPrecondition, match=f"schema {SCHEMA_VERSION + 1}"):
        Store(url(tmp_path))
    with engine.connect() as connection:
        tables = set(connection.scalars(text("SELECT name FROM sqlite_master WHERE type='table'")))
    assert tables == {"meta"}
    engine.dispose()


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "scheduler.db").write_bytes(b"this is no database, it is a poem" * 100)
    with pytest.raises(Unavailable, match="not a database"):
        Store(url(tmp_path))


def test_a_password_is_not_repeated_in_an_error() -> None:
    with pytest.raises(Unavailable) as failure:
        Store("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(failure.value)


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    program = f"""
import asyncio
from scheduler.store.store import Store
from scheduler.store.tables import meta
async def main():
    store = Store({url(tmp_path)!r})
    for index in range(10_000):
        await store.write(lambda c: c.execute(meta.insert().values(key=f"k{{index}}", value="v")))
        print(index, flush=True)
asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(50)]
    process.kill()
    acknowledged += [int(line) for line in process.stdout]
    process.wait()
    reopened = create_engine(url(tmp_path))
    with reopened.connect() as connection:
        keys = set(connection.scalars(select(meta.c.key)))
    reopened.dispose()
    assert {f"k{index}" for index in acknowledged} <= keys


def test_the_tables_compile_for_postgresql() -> None:
    from sqlalchemy.schema import CreateTable

    for table in metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=postgresql.dialect()))

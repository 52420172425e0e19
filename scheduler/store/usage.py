"""The statements of what was used: sums per namespace, function and UTC day, and what idled."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, func, literal, select

from scheduler.store.store import Store
from scheduler.store.tables import calls, idle_usage, usage, usage_bytes

Key = tuple[str, str, str]  # namespace, function, day
KEY_NAMES = ("namespace", "function", "day")
AMOUNTS = tuple(column.name for column in usage.c if column.name not in KEY_NAMES)
ROWS_MAX = 100_000  # that one question may bring
_KEYS_AT_ONCE = 500


@dataclass(slots=True)
class Sums:
    """What a batch of calls adds."""

    amounts: dict[Key, dict[str, float]] = field(default_factory=dict)
    moved_bytes: dict[tuple[str, str, str, str], int] = field(default_factory=dict)

    def add(self, key: Key, amounts: Mapping[str, float], link: str, moved_bytes: int) -> None:
        """Add one call; an empty link moved nothing."""
        total = self.amounts.setdefault(key, {})
        for name, value in amounts.items():
            total[name] = total.get(name, 0) + value
        if link:
            way = (*key, link)
            self.moved_bytes[way] = self.moved_bytes.get(way, 0) + moved_bytes


def known_reports(connection: Connection, keys: Sequence[str]) -> set[str]:
    """Return which reports are stored already."""
    found: set[str] = set()
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        some = calls.c.report_key.in_(keys[start : start + _KEYS_AT_ONCE])
        found.update(connection.scalars(select(calls.c.report_key).where(some)))
    return found


def add(connection: Connection, store: Store, sums: Sums) -> None:
    """Add to what was used."""
    for key, amounts in sums.amounts.items():
        _add(connection, store, usage, dict(zip(KEY_NAMES, key, strict=True)), amounts)
    for way, moved_bytes in sums.moved_bytes.items():
        row = dict(zip((*KEY_NAMES, "link"), way, strict=True))
        _add(connection, store, usage_bytes, row, {"moved_bytes": moved_bytes})


def add_idle(
    connection: Connection,
    store: Store,
    idle: Mapping[tuple[str, str, str, str], tuple[float, float]],
) -> None:
    """Add to what idled: (namespace, function, day, node) → GB-seconds and USD."""
    for place, (gb_s, usd) in idle.items():
        row = dict(zip((*KEY_NAMES, "node_id"), place, strict=True))
        _add(connection, store, idle_usage, row, {"idle_gb_s": gb_s, "idle_usd": usd})


def _add(
    connection: Connection,
    store: Store,
    table: Table,
    key: Mapping[str, str],
    amounts: Mapping[str, float],
) -> None:
    insert = store.insert(table).values(**key, **amounts)
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=list(key),
            set_={name: table.c[name] + insert.excluded[name] for name in amounts},
        )
    )


def sums_by(
    connection: Connection, keys: Sequence[str], namespace: str, since: str, until: str
) -> Sequence[dict[str, Any]]:
    """Return one row per combination of `keys`, in their order; without keys the total alone.

    A row has the keys, the AMOUNTS, `moved_bytes` per link, `idle_gb_s` and `idle_usd`.
    """
    limits = (namespace, since, until)
    amounts = [func.sum(usage.c[name]).label(name) for name in AMOUNTS]
    rows: dict[tuple[str, ...], dict[str, Any]] = {}

    def row_of(found: Row[Any]) -> dict[str, Any]:
        key = tuple(getattr(found, name) for name in keys)
        zero = {**dict(zip(keys, key, strict=True)), **dict.fromkeys(AMOUNTS, 0)}
        return rows.setdefault(key, {**zero, "moved_bytes": {}, "idle_gb_s": 0.0, "idle_usd": 0.0})

    for found in connection.execute(_grouped(usage, keys, amounts, limits).having(_has_rows())):
        row_of(found).update({name: getattr(found, name) for name in AMOUNTS})
    moved = [func.sum(usage_bytes.c.moved_bytes).label("moved_bytes")]
    for found in connection.execute(_grouped(usage_bytes, [*keys, "link"], moved, limits)):
        row_of(found)["moved_bytes"][found.link] = int(found.moved_bytes)
    for found in connection.execute(_grouped(idle_usage, keys, _IDLE, limits).having(_has_rows())):
        row_of(found).update(idle_gb_s=found.idle_gb_s, idle_usd=found.idle_usd)
    return [rows[key] for key in sorted(rows)]


def idle_by_node(
    connection: Connection, namespace: str, since: str, until: str
) -> Sequence[Row[Any]]:
    """Return what idled per namespace, function and node."""
    keys = ("namespace", "function", "node_id")
    return connection.execute(_grouped(idle_usage, keys, _IDLE, (namespace, since, until))).all()


def spent_usd(
    connection: Connection, namespaces: Iterable[str], day: str
) -> dict[tuple[str, str], float]:
    """Return what was spent on a day by (namespace, function), and by (namespace, "") in all."""
    query = select(usage.c.namespace, usage.c.function, usage.c.money_usd)
    query = query.where(usage.c.namespace.in_(list(namespaces))).where(usage.c.day == day)
    spent: dict[tuple[str, str], float] = {}
    for namespace, function, usd in connection.execute(query):
        spent[namespace, function] = usd
        spent[namespace, ""] = spent.get((namespace, ""), 0.0) + usd
    return spent


_IDLE = [func.sum(idle_usage.c[name]).label(name) for name in ("idle_gb_s", "idle_usd")]


def _has_rows() -> ColumnElement[bool]:
    """Keep the one row of no rows out, which a sum without groups gives."""
    return func.count(literal(1)) > 0


def _grouped(
    table: Table,
    keys: Sequence[str],
    sums: Sequence[ColumnElement[Any]],
    limits: tuple[str, str, str],
) -> Select[Any]:
    namespace, since, until = limits
    columns = [table.c[name] for name in keys]
    query = select(*columns, *sums).group_by(*columns).order_by(*columns).limit(ROWS_MAX + 1)
    if namespace:
        query = query.where(table.c.namespace == namespace)
    if since:
        query = query.where(table.c.day >= since)
    if until:
        query = query.where(table.c.day <= until)
    return query

"""Configuration: one TOML file per process, read once; unknown keys are refused.

Order of precedence: command-line flag > environment `TIERWISE_<KEY>` > file > default.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tierwise.domain.prices import DEFAULT_PRICES, PriceTable, TierPrice
from tierwise.domain.topology import Link, LinkTable, Tier, parse_tier
from tierwise.errors import InvalidArgument


class LinkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One path between two tiers, the same in both directions."""

    rtt_ms: float
    bandwidth_mbit_per_s: float
    jitter_ms: float = 0.0


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`scheduler.toml`. Ports of 0 are chosen by the system and written to `state_dir/address`."""

    state_dir: str
    listen: str = "127.0.0.1:7700"
    join_listen: str = "127.0.0.1:7701"
    advertise: str = ""  # host name or address that others dial; default: the listen host
    database: str = ""  # SQLAlchemy URL; default: SQLite in state_dir
    heartbeat_interval_s: float = 1.0
    policy: str = "learned"
    links: dict[str, LinkConfig] = msgspec.field(default_factory=dict)  # "edge-cloud" = {…}
    work_queue_max: int = 100_000
    call_records_max: int = 50_000
    prices: str = ""  # TOML file, see docs/prices.toml; default: built in, after AWS Lambda's list
    log_level: str = "info"


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Table `[cache]` of `agent.toml`. Zeroes take a share of what the machine has."""

    memory_mib: int = 0  # shared memory for rounds; 0: a quarter of the machine's
    disk_mib: int = 0  # files, a store folder included; 0: half of what is free at the start
    quota_mib: int = 0  # of either, per namespace; 0: no less than all
    store: str = ""  # s3://bucket/prefix, gs://…, az://… or a folder; default: `store` in state_dir
    policy: str = "adaptive"  # or one that agent/cache/policies.py names


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`agent.toml`. Zeroes in `cpus` and `memory_mib` take what the machine or its cgroup has."""

    name: str
    tier: str
    scheduler: str  # host:port of the scheduler's main port
    state_dir: str
    join: str = ""  # host:port of the join port; needed until the node has a certificate
    listen: str = "127.0.0.1:0"
    advertise: str = ""  # host:port that peers dial; default: the listen address
    cpus: float = 0.0
    memory_mib: int = 0
    gpu_slots: int = 0
    speed: float = 1.0
    zone: str = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    queue_max: int = 256
    policy: str = "learned"  # until the scheduler assigns one
    isolation: str = "standard"  # strict (no code unless all layers hold), standard or off
    data: list[str] = msgspec.field(default_factory=list)  # folders that functions may read
    functions_reach_node: bool = False  # whether network= may name the node itself
    emulate_links: bool = False  # delay traffic to peers by the cluster's link table
    emulate_speed: bool = False  # hold each result back as a node of this `speed` would
    seed: int = 0
    log_level: str = "info"
    cache: CacheConfig = CacheConfig()


class ClientConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`client.toml`, beside `ca.pem`, `cert.pem` and `key.pem`: how a user reaches the cluster."""

    scheduler: str
    entry: str = ""  # node that takes this user's calls; default: the first edge, fog, then cloud


Config = TypeVar("Config", SchedulerConfig, AgentConfig, ClientConfig)


def load(
    path: Path | None,
    kind: type[Config],
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Return the configuration in `path`, with environment and overrides laid over it.

    Args:
        path: TOML file, or None for none.
        kind: Which configuration.
        overrides: Values of command-line flags; None values are ignored.
        environ: Where `TIERWISE_<KEY>` is looked up.

    Raises:
        InvalidArgument: The file is missing or not TOML, a key is unknown, missing or of the
            wrong type; the message names file and key.
    """
    values: dict[str, Any] = {}
    where = str(path) if path else "the command line"
    if path is not None:
        try:
            values = msgspec.toml.decode(path.read_bytes())
        except FileNotFoundError:
            raise InvalidArgument(f"no configuration file at {path}") from None
        except (msgspec.DecodeError, OSError) as error:
            raise InvalidArgument(f"{path}: {error}") from None
    for key in kind.__struct_fields__:
        if (text := environ.get(f"TIERWISE_{key.upper()}")) is not None:
            values[key] = text
    values.update({k: v for k, v in (overrides or {}).items() if v is not None})
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{where}: {error}") from None


def dump(config: SchedulerConfig | AgentConfig | ClientConfig) -> bytes:
    """Return the configuration as TOML."""
    return msgspec.toml.encode(config)


def link_table(links: Mapping[str, LinkConfig]) -> LinkTable:
    """Turn `{"edge-cloud": …}` into a table that holds both directions.

    Raises:
        InvalidArgument: A key is not two tiers joined by '-', or a figure is not positive.
    """
    by_tier: dict[tuple[Tier, Tier], Link] = {}
    for key, value in links.items():
        try:
            source, target = (parse_tier(part) for part in key.split("-"))
        except ValueError as error:
            raise InvalidArgument(f"links.{key}: {error}; write for example edge-cloud") from None
        if value.rtt_ms < 0 or value.bandwidth_mbit_per_s <= 0 or value.jitter_ms < 0:
            raise InvalidArgument(f"links.{key}: rtt, jitter ≥ 0 and bandwidth > 0 are needed")
        link = Link(
            rtt_s=value.rtt_ms / 1e3,
            bandwidth_bytes_per_s=value.bandwidth_mbit_per_s * 125_000.0,
            jitter_s=value.jitter_ms / 1e3,
        )
        by_tier[source, target] = by_tier[target, source] = link
    return LinkTable(by_tier=by_tier)


def python_version() -> str:
    """Return the minor version of Python that runs here, "3.11"; no other loads its pickles."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


USD_MAX = 1e6


class TierPriceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tier of a price file; what is left out costs what it costs by default."""

    usd_per_gb_s: float | None = None
    usd_per_million_requests: float | None = None
    usd_per_gb_in: float | None = None
    usd_per_gb_out: float | None = None
    usd_per_gpu_s: float | None = None
    usd_per_idle_gb_s: float | None = None


class PriceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A price file."""

    is_startup_billed: bool = DEFAULT_PRICES.is_startup_billed
    edge: TierPriceConfig = TierPriceConfig()
    fog: TierPriceConfig = TierPriceConfig()
    cloud: TierPriceConfig = TierPriceConfig()


def load_prices(path: Path | None) -> PriceTable:
    """Return the prices in a TOML file; None means the built-in ones.

    Raises:
        InvalidArgument: The file is missing or not TOML, a key is unknown, or a price is negative
            or no number; the message names file and key.
    """
    if path is None:
        return DEFAULT_PRICES
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=PriceConfig)
    except FileNotFoundError:
        raise InvalidArgument(f"there is no price file at {path}") from None
    except msgspec.ValidationError as error:
        known = ", ".join(TierPriceConfig.__struct_fields__)
        raise InvalidArgument(
            f"{path}: {error}; use is_startup_billed and, in [edge], [fog] and [cloud], {known}"
        ) from None
    except (msgspec.DecodeError, OSError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    return PriceTable(
        by_tier={tier: _tier_price(getattr(found, tier.label), tier, path) for tier in Tier},
        is_startup_billed=found.is_startup_billed,
    )


def _tier_price(found: TierPriceConfig, tier: Tier, path: Path) -> TierPrice:
    given = {
        key: value for key, value in msgspec.structs.asdict(found).items() if value is not None
    }
    for key, value in given.items():
        if not 0.0 <= value <= USD_MAX:
            raise InvalidArgument(
                f"{path}: {tier.label}.{key} = {value}: use a number of USD from 0 to {USD_MAX:g}"
            )
    if (millions := given.pop("usd_per_million_requests", None)) is not None:
        given["usd_per_request"] = millions / 1e6
    return replace(DEFAULT_PRICES.by_tier[tier], **given)


_SIZE = re.compile(r"\s*([0-9.]+)\s*([KMGT]i?B|B)?\s*", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DURATION = re.compile(r"\s*([0-9.]+)\s*(us|ms|s|m|h|d)\s*")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_memory_mib(text: str | int) -> int:
    """Return MiB of "256MiB", "1GiB" or a plain number of MiB.

    Raises:
        InvalidArgument: It is no size, or under 1 MiB.
    """
    if isinstance(text, int):
        mib = float(text)
    else:
        match = _SIZE.fullmatch(text)
        if match is None or not _is_number(match[1]):
            raise InvalidArgument(f"{text!r} is no memory size: write for example 256MiB or 1GiB")
        unit = (match[2] or "").upper()
        scale = _UNITS[unit[:1]] / 2**20 if unit else 1.0
        mib = float(match[1]) * scale
    if mib < 1:
        raise InvalidArgument(f"{text!r} is under 1 MiB: write for example 256MiB")
    return round(mib)


def parse_duration_s(text: str | float) -> float:
    """Return seconds of "200ms", "1.5s", "2m" or a plain number of seconds.

    Raises:
        InvalidArgument: It is no duration, or not positive.
    """
    if isinstance(text, int | float):
        seconds = float(text)
    else:
        match = _DURATION.fullmatch(text)
        if match is None or not _is_number(match[1]):
            raise InvalidArgument(f"{text!r} is no duration: write for example 200ms, 1.5s or 2m")
        seconds = float(match[1]) * _SECONDS[match[2]]
    if not seconds > 0 or seconds == float("inf"):
        raise InvalidArgument(f"{text!r}: a duration must be positive and finite")
    return seconds


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

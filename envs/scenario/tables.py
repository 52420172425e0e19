"""The tables of a scenario, as they stand in its files. docs/scenarios.md explains them.

Seconds, bytes and MiB, as everywhere in the house; a number that is not finite, or outside of its
bounds, is refused with the field's name, and so is a key that nobody knows.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tierwise.errors import InvalidArgument, NotFound

FORMAT: Literal[1] = 1
NODES_MAX = 10_000
FUNCTIONS_MAX = 10_000
LINKS_MAX = 1_000_000
ARRIVALS_MAX = 1_000_000
TABLES_BYTES_MAX = 64 * 2**20
ARRIVALS_BYTES_MAX = 256 * 2**20
TEXT_MAX = 256
LABELS_MAX = 64

TierName = Literal["edge", "fog", "cloud"]
PriorityName = Literal["low", "normal", "high", "critical"]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e7)]
Duration = Annotated[float, msgspec.Meta(gt=0, le=1e7)]
Ratio = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**50)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]


class NodeRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[nodes]]`: one machine. `speed` divides run times and cold starts; 1.0 is the reference."""

    name: Name
    tier: TierName
    cpus: Ratio
    memory_mib: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    speed: Ratio = 1.0
    gpu_slots: Count = 0
    zone: Text = ""
    labels: Annotated[dict[Text, Text], msgspec.Meta(max_length=LABELS_MAX)] = {}


class LinkFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A path: half the round trip each way, plus up to `jitter_s`, plus bytes ÷ bandwidth."""

    rtt_s: Seconds
    bandwidth_bytes_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e15)]
    jitter_s: Seconds = 0.0


class LinkRow(LinkFigures, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[links]]`: between two tiers or between two nodes, both ways unless `one_way`."""

    between: tuple[Name, Name]
    one_way: bool = False


class FunctionRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[functions]]`: what is declared of a function, and how it really behaves.

    `run_s` is the median of one run on a node of speed 1.0; runs are lognormal with `run_sigma`.
    """

    name: Name
    run_s: Duration
    run_sigma: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.2
    cold_start_s: Seconds = 0.2
    request_bytes: Bytes = 1000
    response_bytes: Bytes = 1000
    deadline_s: Duration = 1.0
    timeout_s: Duration = 60.0
    priority: PriorityName = "normal"
    memory_mib: Annotated[int, msgspec.Meta(ge=1, le=2**30)] = 256
    cpus: Ratio = 1.0
    gpu_slots: Count = 0
    tiers: Annotated[tuple[TierName, ...], msgspec.Meta(min_length=1)] = ("edge", "fog", "cloud")
    instances_max: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 16
    keep_alive_s: Seconds = 300.0
    budget_usd: Seconds | None = None
    retries_max: Count = 2


class FaultRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[faults]`: what goes wrong, as in `envs.world.Faults`."""

    drop: Probability = 0.0
    duplicate: Probability = 0.0
    delay: Probability = 0.0
    delay_s: Seconds = 2.0
    crash_interval_s: Seconds = 0.0
    down_s: Seconds = 1.0
    partition_interval_s: Seconds = 0.0
    partition_s: Seconds = 3.0
    until_s: Seconds = 0.0


class ScenarioFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`scenario.toml`. `arrivals` is a CSV file in the same folder."""

    format: Literal[1]
    nodes: Annotated[tuple[NodeRow, ...], msgspec.Meta(min_length=1, max_length=NODES_MAX)]
    functions: Annotated[
        tuple[FunctionRow, ...], msgspec.Meta(min_length=1, max_length=FUNCTIONS_MAX)
    ]
    arrivals: Name = "arrivals.csv"
    heartbeat_interval_s: Annotated[float, msgspec.Meta(ge=0.01, le=3600)] = 0.5
    default_link: LinkFigures | None = None
    links: Annotated[tuple[LinkRow, ...], msgspec.Meta(max_length=LINKS_MAX)] = ()
    faults: FaultRow = FaultRow()


class ArrivalRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line of the CSV file. Each has either `at_s` or `after`; empty fields take defaults.

    `stage` puts the request into a numbered group; a line with `after = n` arrives when all of
    group n have ended. `run_s` is this request's own run time at speed 1.0, all items together.
    """

    function: Name
    origin: Name
    at_s: Seconds | None = None
    after: Annotated[int, msgspec.Meta(ge=1, le=10**9)] | None = None
    priority: PriorityName | None = None  # the function's own
    bytes: Bytes | None = None  # the function's request_bytes, for each item
    items: Annotated[int, msgspec.Meta(ge=1, le=4_096)] = 1
    run_s: Duration | None = None  # drawn
    deadline_s: Duration | None = None  # the function's own, for each item
    data_node: Text = ""
    data_bytes: Bytes = 0
    pinned: bool = False  # to data_node
    durable: bool = False
    stage: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 0


class TableFile:
    """A TOML file of `ScenarioFile`'s shape; its errors say on which line."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            NotFound: There is no such file.
            InvalidArgument: It is too large, no TOML, or not of that shape.
        """
        self._path = path
        self._text = read_text(path, TABLES_BYTES_MAX)
        try:
            values = msgspec.toml.decode(self._text)
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"{path}: {error}") from None
        try:
            self.table = msgspec.convert(values, ScenarioFile)
        except msgspec.ValidationError as error:
            what, _, where = str(error).partition(" - at `$.")
            raise self.wrong(where.rstrip("`"), what) from None

    def wrong(self, field: str, message: str) -> InvalidArgument:
        """Return the error of a field, for example `nodes[2].cpus`."""
        line = self._line(field)
        where = f"{self._path} line {line}" if line else f"{self._path}"
        return InvalidArgument(f"{where}: {field}: {message}" if field else f"{where}: {message}")

    def _line(self, field: str) -> int:
        """Return the line that a field stands on, or its table begins on; 0 if it is unclear."""
        match = re.match(r"(\w+)(?:\[(\d+)\])?(?:\.(\w+))?", field)
        if match is None:
            return 0
        name, index, key = match.groups()
        lines = self._text.splitlines()
        header = rf"\s*\[\[\s*{name}\s*\]\]" if index else rf"\s*(\[\s*{name}\s*\]|{name}\s*=)"
        starts = [n for n, line in enumerate(lines) if re.match(header, line)]
        if index and not starts:  # `nodes = [`, one `{ … }` a line
            opened = next((n for n, li in enumerate(lines) if re.match(rf"{name}\s*=", li)), None)
            inside = range(opened + 1, len(lines)) if opened is not None else ()
            starts, key = [n for n in inside if re.match(r"\s*\{", lines[n])], None
        if int(index or 0) >= len(starts):
            return 0
        start = starts[int(index or 0)]
        for number in range(start + 1, len(lines)) if key else ():
            if re.match(r"\s*\[", lines[number]):
                break
            if re.match(rf"\s*{key}\s*=", lines[number]):
                return number + 1
        return start + 1


def read_arrivals(path: Path) -> Iterator[tuple[int, ArrivalRow]]:
    """Yield each row of an arrivals file with the number of its line.

    Raises:
        NotFound: There is no such file.
        InvalidArgument: It is too large, a column is unknown or missing, or a field is wrong.
    """
    lines = csv.reader(io.StringIO(read_text(path, ARRIVALS_BYTES_MAX), newline=""), strict=True)
    known = ArrivalRow.__struct_fields__
    try:
        header = [name.strip() for name in next(lines, [])]
        unknown = [name for name in header if name not in known]
        missing = [name for name in ("function", "origin") if name not in header]
        if unknown or missing or len(set(header)) < len(header):
            problem = f"unknown columns {unknown}" if unknown else f"columns {missing} are missing"
            if not unknown and not missing:
                problem = "a column stands there twice"
            raise InvalidArgument(f"{path} line 1: {problem}; known: {', '.join(known)}")
        count = 0
        for cells in lines:
            if not cells:
                continue
            count += 1
            if count > ARRIVALS_MAX:
                raise InvalidArgument(f"{path}: more than {ARRIVALS_MAX} arrivals")
            if len(cells) != len(header):
                raise InvalidArgument(
                    f"{path} line {lines.line_num}: {len(cells)} fields, {len(header)} columns"
                )
            given = {key: cell for key, cell in zip(header, cells, strict=True) if cell != ""}
            try:
                yield lines.line_num, msgspec.convert(given, ArrivalRow, strict=False)
            except msgspec.ValidationError as error:
                what, _, where = str(error).partition(" - at `$.")
                field = f"{where.rstrip('`')}: " if where else ""
                raise InvalidArgument(f"{path} line {lines.line_num}: {field}{what}") from None
    except csv.Error as error:
        raise InvalidArgument(f"{path} line {lines.line_num}: {error}") from None


def toml_path(path: Path, *, is_new: bool = False) -> Path:
    """Return the TOML file of a scenario: `path` itself, or the one in this folder."""
    is_folder = path.suffix != ".toml" if is_new else path.is_dir()
    return path / "scenario.toml" if is_folder else path


def read_text(path: Path, bytes_max: int) -> str:
    """Return a text file's content.

    Raises:
        NotFound: There is no such file.
        InvalidArgument: It is too large, unreadable or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(bytes_max + 1)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from None
    if len(content) > bytes_max:
        raise InvalidArgument(f"{path}: larger than {bytes_max >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path}: not UTF-8 at byte {error.start}") from None

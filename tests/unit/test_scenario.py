"""Scenario files: what is written can be read, what is wrong is refused with its place."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from envs import scenario
from envs.simulator import Simulator
from envs.world import NAMED, World, make_world
from tierwise.domain.function import Priority
from tierwise.domain.outcome import OutcomeState
from tierwise.domain.topology import Tier
from tierwise.errors import InvalidArgument, NotFound
from tierwise.placement.policy import create

ROOT = Path(__file__).parents[2]


def example(folder: Path) -> Path:
    """Write the files that docs/scenarios.md shows."""
    text = (ROOT / "docs/scenarios.md").read_text()
    for name, language in (("scenario.toml", "toml"), ("arrivals.csv", "csv")):
        (block,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
        (folder / name).write_text(block)
    return folder


def digest(world: World, seed: int) -> str:
    simulator = Simulator(world, seed)
    simulator.run(create("ect"))
    return simulator.log_digest()


@pytest.mark.parametrize("preset", NAMED)
def test_a_world_that_was_written_and_read_simulates_alike(preset: str, tmp_path: Path) -> None:
    world = make_world(preset, 3, request_count=60)
    scenario.write(world, tmp_path)
    again = scenario.read(tmp_path)
    assert again.links == world.links
    assert again.faults == world.faults
    assert digest(again, 7) == digest(world, 7)


def test_random_worlds_with_rounds_joins_and_positions_survive_too(tmp_path: Path) -> None:
    for seed in range(30):
        world = make_world("random", seed, request_count=40)
        scenario.write(world, tmp_path / f"{seed}.toml")
        again = scenario.read(tmp_path / f"{seed}.toml")
        assert again.trace.stages == world.trace.stages
        assert digest(again, seed) == digest(world, seed), seed


def test_the_documents_example_is_complete_and_does_what_it_says(tmp_path: Path) -> None:
    world = scenario.read(example(tmp_path))
    edge, other, cloud = world.nodes
    assert (edge.tier, edge.speed, cloud.speed) == (Tier.EDGE, 0.4, 1.0)
    assert world.links.between(edge, other).rtt_s == 0.004
    assert world.links.between(cloud, edge).bandwidth_bytes_per_s == 9e6
    assert world.trace.request_count == 8
    assert world.trace.stages[3].size == 2
    second = world.trace.arrivals[1]
    assert (second.priority, second.request_bytes) == (Priority.HIGH, 90_000)
    simulator = Simulator(world, 1)
    outcomes = {o.request_id: o for o in simulator.run(create("edge-only"))}
    assert all(o.state is OutcomeState.OK for o in outcomes.values())
    assert outcomes["s00003-1"].node_id == "cloud-1"  # merge may not run at an edge
    given = outcomes[next(r for r, a, _ in simulator.schedule.planned() if a is second)]
    assert given.latency.run_s == pytest.approx(0.11 / 0.4)  # as the file says, whatever the seed


def test_policies_are_evaluated_on_the_documents_example(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.evaluate", "--scenario", str(example(tmp_path))]
    command += ["--policies", "ect,cloud-only", "--seeds", "2", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    rows = json.loads(done.stdout)
    assert [row["policy"] for row in rows] == ["ect", "cloud-only"]
    assert rows[0]["preset"] == tmp_path.name
    assert rows[1]["cloud"] > rows[0]["cloud"]


TABLES = [
    ("memory_mib = 128", "memory_mb = 128", r"scenario.toml line \d+: functions\[0\].*`memory_mb`"),
    ("speed = 0.4", "speed = nan", r"line 8: nodes\[0\].speed: Expected `float` > 0"),
    ("cpus = 4", "cpus = -4", r"line 20: nodes\[2\].cpus"),
    ('tier = "cloud"', 'tier = "moon"', r"nodes\[2\].tier: Invalid enum value 'moon'"),
    ('name = "edge-2"', 'name = "edge-1"', r"line 11: nodes\[1\].name: there is another 'edge-1'"),
    ('name = "edge-2"', 'name = "fog"', "'fog' names no node"),
    ('"edge-1", "edge-2"', '"edge-1", "edge-9"', r"links\[1\].between: .*two tiers or two nodes"),
    ('name = "merge"', 'name = "no merge"', "is no function"),
    ("format = 1", "format = 2", "line 1: format"),
    ("format = 1", 'format = 1\narrivals = "../x.csv"', "line 2: arrivals: .*own folder"),
    ("format = 1", "format = ", r"scenario.toml: .*line 1"),
]


@pytest.mark.parametrize(("old", "new", "message"), TABLES)
def test_a_wrong_table_is_refused_with_line_and_field(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = example(tmp_path) / "scenario.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InvalidArgument, match=message):
        scenario.read(tmp_path)


LINES = [
    ("at_s,after", "when,after", r"arrivals.csv line 1: unknown columns \['when'\]"),
    ("function,origin", "function,pinned", r"line 1: columns \['origin'\] are missing"),
    ("priority,bytes", "bytes,bytes", "twice"),
    ("0.9,,detect", "inf,,detect", "line 4: at_s: Expected `float`"),
    ("0.9,,detect", "soon,,detect", "line 4: at_s: Expected `float"),
    ("0.9,,detect", "0.9,1,detect", "line 4: at_s: give either at_s or after"),
    ("0.9,,detect", ",,detect", "line 4: at_s: give either"),
    ("0.9,,detect", "0.9,,detekt", "line 4: function: the scenario has no function"),
    ("0.9,,detect,edge-2", "0.9,,detect,edge-3", "line 4: origin: the scenario has no node"),
    ("high,90000", "highest,90000", "line 3: priority: Invalid enum value"),
    ("high,90000", "high,-1", "line 3: bytes: Expected `int` >= 0"),
    (",edge-1,true,3", ",,true,3", "line 5: pinned: needs a data_node"),
    (",2,notify", ",4,notify", "stage: no line has after = 2"),
    (",3,merge,edge-1,,400000,,,,", ",3,merge,edge-1,,400000,,,,3", "stage: waits for itself"),
    ("2.0,,train,edge-2,,2000,,edge-2,true,3", "2.0,,train", "line 6: 3 fields, 10 columns"),
]


@pytest.mark.parametrize(("old", "new", "message"), LINES)
def test_a_wrong_line_is_refused_with_line_and_field(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = example(tmp_path) / "arrivals.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InvalidArgument, match=message):
        scenario.read(tmp_path)


def test_what_is_no_text_missing_or_endless_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no file .*x\.toml"):
        scenario.read(tmp_path / "x.toml")
    example(tmp_path)
    (tmp_path / "arrivals.csv").write_bytes(b"at_s,function,origin\n0,detect,\xff\n")
    with pytest.raises(InvalidArgument, match="not UTF-8 at byte"):
        scenario.read(tmp_path)
    (tmp_path / "arrivals.csv").write_text("at_s,function,origin\n")
    with pytest.raises(InvalidArgument, match="nothing would ever arrive"):
        scenario.read(tmp_path)
    (tmp_path / "arrivals.csv").unlink()
    with pytest.raises(NotFound, match=r"arrivals\.csv"):
        scenario.read(tmp_path)
    (tmp_path / "scenario.toml").unlink()
    (tmp_path / "scenario.toml").mkdir()
    with pytest.raises(InvalidArgument):
        scenario.read(tmp_path)


def test_a_spreadsheets_mark_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    world = scenario.read(example(tmp_path))
    path = tmp_path / "arrivals.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert scenario.read(tmp_path) == world

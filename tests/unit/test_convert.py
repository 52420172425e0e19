"""Domain ⇄ protobuf: what goes out comes back, and what is wrong is refused by name."""

import math
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from tierwise.domain.budget import SpentBudget
from tierwise.domain.decision import CandidateScore, Explanation, Reason, ShadowDecision
from tierwise.domain.event import PeerSeen, ViewReceived
from tierwise.domain.function import ALL_TIERS, Catalogue, FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import NodeId, is_name
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.prices import LINK_CLASSES, PriceTable, TierPrice
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.sizing import Growth, Sizing, Term
from tierwise.domain.topology import Link, LinkTable, Node, NodeState, Tier
from tierwise.domain.view import NodeReading
from tierwise.errors import InvalidArgument
from tierwise.v1 import node_pb2, types_pb2
from tierwise.wire import convert

HERE = NodeId("edge-1")

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True).filter(is_name)
words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=20)
seconds = st.floats(0, 1e6)
some_tiers = st.frozensets(st.sampled_from(Tier), min_size=1)
counts = st.integers(0, 2**31 - 1)
sizes = st.integers(0, 2**62)

specs = st.builds(
    FunctionSpec,
    namespace=names,
    name=names,
    version=st.integers(1, 2**31 - 1),
    code_digest=st.sampled_from(["", "0af9" * 16]),
    requirements=st.lists(
        st.sampled_from(
            [
                "pillow>=11",
                "numpy==2.1",
                "a[b]",
                "A.b_c-d [x, y] >= 1.0, !=1.2.*, < 3 ; python_version < '3.13'",
                "torch==2.13.0+cpu",
                "x (>=1,<2)",
                "y~=1!2.0.dev1",
            ]
        )
    ).map(tuple),
    memory_mib=st.integers(1, 10_000_000),
    cpus=st.floats(0.01, 1024),
    gpu_slots=st.integers(0, 1024),
    timeout_s=st.floats(1e-3, 604_800),
    deadline_s=st.floats(1e-3, 604_800),
    priority=st.sampled_from(Priority),
    tiers=some_tiers,
    instances_max=st.integers(1, 10_000),
    keep_alive_s=st.floats(0, 604_800),
    budget_usd=st.none() | st.floats(0, 1e9),
    retries_max=st.integers(0, 20),
    description=words,
    is_memory_auto=st.booleans(),
    network=st.lists(st.sampled_from(["api.example:443", "10.0.0.1:80"]), max_size=2).map(tuple),
)
function_ids = specs.map(lambda spec: spec.function_id)
profiles = st.builds(
    FunctionProfile,
    run_s=seconds,
    cold_start_s=seconds,
    response_bytes=sizes,
    rate_per_s=seconds,
    call_count=sizes,
)
measures = st.dictionaries(words, st.floats(-1e15, 1e15), max_size=4)
growths = st.builds(
    Growth,
    terms=st.lists(
        st.builds(
            Term,
            powers=st.lists(st.tuples(words, st.floats(0, 8)), max_size=2).map(tuple),
            coefficient=st.floats(0, 1e12),
        ),
        max_size=3,
    ).map(tuple),
)
sizings = st.builds(
    Sizing,
    memory=growths,
    run=growths,
    margin=st.floats(0, 1e6),
    margin_beyond=st.floats(0, 1e6),
    highest=measures,
    sample_count=sizes,
)
catalogues = st.builds(
    lambda revision, found, known, sized: Catalogue(
        revision=revision,
        functions={spec.function_id: spec for spec in found},
        profiles=known,
        sizings=sized,
    ),
    sizes,
    st.lists(specs, max_size=3),
    st.dictionaries(function_ids, profiles, max_size=3),
    st.dictionaries(function_ids, sizings, max_size=3),
)
amounts = st.builds(
    Resources,
    cpus=st.floats(0, 10_000),
    memory_mib=st.integers(0, 1_000_000_000),
    gpu_slots=st.integers(0, 10_000),
)
nodes = st.builds(
    Node,
    node_id=names,
    tier=st.sampled_from(Tier),
    capacity=amounts,
    speed=st.floats(1e-3, 1e3),
    address=st.sampled_from(["", "127.0.0.1:7700", "[::1]:80", "fog-1.example:65535"]),
    zone=words,
    labels=st.dictionaries(words, words, max_size=3).map(lambda d: tuple(sorted(d.items()))),
)
readings = st.builds(
    NodeReading,
    sequence=sizes,
    free=amounts,
    running=counts,
    queued=counts,
    backlog_s=seconds,
    overtaken_s=st.just(()) | st.tuples(*[seconds] * len(Priority)),
    warm=st.dictionaries(function_ids, counts, max_size=3),
    engaged=st.dictionaries(function_ids, counts, max_size=3),
    eviction_price_s_per_mib=seconds,
)
links = st.builds(
    Link,
    rtt_s=st.floats(0, 1e4),
    bandwidth_bytes_per_s=st.floats(1, 1e12) | st.just(math.inf),
    jitter_s=st.floats(0, 1e4),
)
link_tables = st.builds(
    LinkTable,
    by_tier=st.dictionaries(st.tuples(st.sampled_from(Tier), st.sampled_from(Tier)), links),
    default=links,
)
peers = st.builds(
    PeerSeen, node=nodes, state=st.sampled_from(NodeState), reading=readings, age_s=seconds
)
views = st.builds(
    ViewReceived,
    peers=st.lists(peers, max_size=3).map(tuple),
    links=st.none() | link_tables,
    profiles=st.none() | st.dictionaries(function_ids, profiles, min_size=1, max_size=3),
    is_full=st.booleans(),
)
refusals = st.lists(st.tuples(names, st.sampled_from(Reason)), max_size=4).map(tuple)
figures = st.floats(-1e6, 1e6)
explanations = st.builds(
    Explanation,
    policy_id=words,
    candidates=st.lists(
        st.builds(CandidateScore, names, *[figures] * (len(CandidateScore._fields) - 1)), max_size=4
    ).map(tuple),
    masked=refusals,
    heuristic_choice=st.none() | names,
    choice=st.none() | names,
    fallback=words,
)
shadows = st.builds(
    ShadowDecision,
    policy_id=words,
    node_id=st.none() | names,
    is_same=st.booleans(),
    gain_s=st.floats(-1e6, 1e6),
    odds=st.lists(st.tuples(names, st.floats(0, 1)), max_size=4).map(tuple),
    error=words,
)
item_counts = st.integers(0, 4096).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
parts = st.floats(-1, 1e6)
outcomes = st.builds(
    lambda items, **fields: Outcome(item_count=items[0], failed_item_count=items[1], **fields),
    item_counts,
    request_id=words.filter(bool),
    function_id=function_ids,
    state=st.sampled_from(OutcomeState),
    origin=names,
    node_id=st.none() | names,
    latency=st.builds(
        LatencySplit,
        queue_s=parts,
        transfer_s=parts,
        cold_start_s=parts,
        run_s=parts,
        return_s=parts,
    ),
    deadline_s=figures,
    priority=st.sampled_from(Priority),
    memory_mib=counts,
    peak_memory_mib=seconds,
    request_bytes=sizes,
    response_bytes=sizes,
    gb_s=seconds,
    gpu_s=seconds,
    cpu_s=seconds,
    link=st.sampled_from(("", *LINK_CLASSES)),
    money_usd=seconds,
    energy_j=seconds,
    is_cold=st.booleans(),
    error_code=words,
    message=words,
    reason=st.none() | st.sampled_from(Reason),
    tried=refusals,
    policy_id=words,
    explanation=st.none() | explanations,
    lease=sizes,
    shadow=st.none() | shadows,
    trial_id=sizes,
    block=sizes,
    measures=measures,
    retried_gb_s=seconds,
    refused_calls=st.dictionaries(words, counts, max_size=3).map(
        lambda found: tuple(sorted(found.items()))
    ),
)
usd = st.floats(0, 1e6)
price_tables = st.builds(
    PriceTable,
    by_tier=st.fixed_dictionaries(
        {tier: st.builds(TierPrice, **dict.fromkeys(TierPrice.__slots__, usd)) for tier in Tier}
    ),
    is_startup_billed=st.booleans(),
)
spent_budgets = st.builds(
    SpentBudget,
    namespace=names,
    function=st.just("") | names,
    usd_per_day=usd,
    spent_usd=usd,
    ends_unix_s=st.floats(0, 1e10),
)
times = st.floats(1e-3, 604_800) | st.floats(-604_800, -1e-3)
blobs = st.lists(st.binary(max_size=8), min_size=1, max_size=3)
requests = st.builds(
    Request,
    request_id=words.filter(bool),
    spec=specs,
    origin=names,
    priority=st.sampled_from(Priority),
    deadline_s=times,
    timeout_s=times,
    budget_usd=st.floats(0, 1e9),
    data_nodes=st.lists(names, max_size=3).map(tuple),
    data_bytes=sizes,
    tiers=st.none() | some_tiers,
    node_id=st.none() | names,
    hops=st.integers(0, 5),
    lease=sizes,
)

ROUND_TRIPS: dict[str, tuple[Any, Callable[..., Any], Callable[..., Any]]] = {
    "spec": (specs, convert.spec_to_pb, convert.spec_from_pb),
    "profile": (profiles, convert.profile_to_pb, convert.profile_from_pb),
    "sizing": (sizings, convert.sizing_to_pb, convert.sizing_from_pb),
    "catalogue": (catalogues, convert.catalogue_to_pb, convert.catalogue_from_pb),
    "resources": (amounts, convert.resources_to_pb, convert.resources_from_pb),
    "node": (nodes, convert.node_to_pb, convert.node_from_pb),
    "reading": (readings, convert.reading_to_pb, convert.reading_from_pb),
    "link": (links, convert.link_to_pb, convert.link_from_pb),
    "links": (link_tables, convert.links_to_pb, convert.links_from_pb),
    "peer": (peers, convert.peer_to_pb, convert.peer_from_pb),
    "view": (views, convert.view_to_pb, convert.view_from_pb),
    "tiers": (some_tiers, convert.tiers_to_pb, convert.tiers_from_pb),
    "explanation": (explanations, convert.explanation_to_pb, convert.explanation_from_pb),
    "outcome": (outcomes, convert.outcome_to_pb, convert.outcome_from_pb),
    "prices": (price_tables, convert.prices_to_pb, convert.prices_from_pb),
    "spent": (spent_budgets, convert.spent_to_pb, convert.spent_from_pb),
}


@pytest.mark.parametrize("kind", ROUND_TRIPS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_sent_comes_back_equal(kind: str, data: st.DataObject) -> None:
    values, to_pb, from_pb = ROUND_TRIPS[kind]
    value = data.draw(values)
    message = to_pb(value)
    if not isinstance(message, list):
        message = type(message).FromString(message.SerializeToString())
    assert from_pb(message) == value


@settings(max_examples=60, deadline=None)
@given(request=requests, arguments=blobs)
def test_a_request_arrives_at_the_next_node_as_it_left(
    request: Request, arguments: list[bytes]
) -> None:
    message = convert.invocation_from_request(request, arguments)
    arrived = convert.request_from_invocation(message, request.spec, origin=request.origin)
    assert message.function == request.spec.function_id
    assert arrived.request_bytes == sum(map(len, arguments))
    assert arrived.item_count == len(arguments)
    for field in (
        *("request_id", "spec", "origin", "priority", "deadline_s", "timeout_s", "budget_usd"),
        *("data_nodes", "data_bytes", "tiers", "node_id", "hops", "lease"),
    ):
        assert getattr(arrived, field) == getattr(request, field), field


def test_every_translator_exists_in_both_directions() -> None:
    kinds = {name.rpartition("_to_pb")[0] for name in convert.__all__ if name.endswith("_to_pb")}
    assert kinds == set(ROUND_TRIPS)
    assert {f"{kind}_from_pb" for kind in kinds} <= set(convert.__all__)


@pytest.mark.parametrize(
    ("kind", "message", "prefix"),
    [
        (Tier, types_pb2.Tier, "TIER_"),
        (Priority, types_pb2.Priority, "PRIORITY_"),
        (NodeState, types_pb2.NodeState, "NODE_STATE_"),
        (OutcomeState, types_pb2.OutcomeState, "OUTCOME_STATE_"),
        (Reason, types_pb2.Reason, "REASON_"),
    ],
)
def test_enumerations_have_the_names_and_numbers_of_the_protos(
    kind: type[IntEnum], message: Any, prefix: str
) -> None:
    ours = {f"{prefix}{member.name}": member.value for member in kind}
    assert ours | {f"{prefix}UNSPECIFIED": 0} == dict(message.items())


# -- defaults -------------------------------------------------------------------------------------

SPEC = FunctionSpec(
    namespace="default",
    name="resize",
    version=3,
    code_digest="ab" * 32,
    deadline_s=0.25,
    timeout_s=10.0,
    priority=Priority.HIGH,
    budget_usd=0.5,
)


def invocation(**fields: Any) -> types_pb2.Invocation:
    return types_pb2.Invocation(
        **{"request_id": "r1", "function": "resize", "arguments": [b"xy", b"z"], **fields}
    )


def request(**fields: Any) -> Request:
    return convert.request_from_invocation(invocation(**fields), SPEC, origin=HERE)


def test_what_a_call_leaves_out_comes_from_its_function() -> None:
    found = request()
    assert (found.deadline_s, found.priority, found.budget_usd) == (0.25, Priority.HIGH, 0.5)
    assert found.timeout_s > SPEC.timeout_s
    assert (found.item_count, found.request_bytes) == (2, 3)
    assert (found.tiers, found.node_id, found.data_nodes) == (None, None, ())


def test_a_budget_of_nothing_is_not_the_default_budget() -> None:
    assert request(budget_usd=0.0).budget_usd == 0.0


def test_a_forwarded_call_whose_time_is_over_stays_over() -> None:
    assert request(deadline_s=-0.5).deadline_s == -0.5


def test_a_function_without_tiers_may_run_anywhere() -> None:
    message = convert.spec_to_pb(SPEC)
    del message.tiers[:]
    assert convert.spec_from_pb(message).tiers == ALL_TIERS


def test_the_rounding_of_free_cpus_is_no_reason_to_refuse_a_heartbeat() -> None:
    free = types_pb2.Resources(cpus=-2.7e-17, memory_mib=1)
    assert convert.reading_from_pb(types_pb2.NodeReading(free=free)).free.cpus == 0.0


def test_an_outcome_can_leave_its_explanation_behind() -> None:
    explanation = Explanation(policy_id="p", candidates=(), masked=(), heuristic_choice=None)
    outcome = Outcome(
        request_id="r",
        function_id=SPEC.function_id,
        state=OutcomeState.OK,
        origin=HERE,
        node_id=HERE,
        explanation=explanation,
    )
    sent = convert.outcome_to_pb(outcome, with_explanation=False)
    assert convert.outcome_from_pb(sent).explanation is None


@pytest.mark.parametrize("message", ["\udcff not UTF-8", "x" * 100_000])
def test_an_outcome_travels_whatever_its_message_holds(message: str) -> None:
    outcome = Outcome(
        request_id="r",
        function_id=SPEC.function_id,
        state=OutcomeState.FAILED,
        origin=HERE,
        node_id=None,
        message=message,
    )
    arrived = convert.outcome_from_pb(convert.outcome_to_pb(outcome)).message
    assert arrived[1:8] == message[1:8]
    assert len(arrived) <= 4096


# -- refusals -------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


def refused(call: Callable[[], object], *told: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        call()
    for words in told:
        assert words in caught.value.message, caught.value.message


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"namespace": "Upper"}, ("namespace 'Upper'", "a-z")),
        ({"name": ""}, ("name ''",)),
        ({"name": "a/b"}, ("name 'a/b'",)),
        ({"name": "x" * 64}, ("name", "at most 63")),
        ({"version": -1}, ("version = -1",)),
        ({"code_digest": "../../etc/passwd"}, ("code_digest '../../etc/passwd'", "SHA-256")),
        ({"requirements": ["--index-url=http://elsewhere"]}, ("requirements", "no package")),
        ({"requirements": [" -r /etc/passwd"]}, ("requirements", "no package")),
        ({"requirements": ["/tmp/x.whl"]}, ("requirements", "no package")),
        ({"requirements": ["x @ https://elsewhere/x.whl"]}, ("requirements", "no URLs")),
        ({"requirements": ["git+https://elsewhere/x"]}, ("requirements", "no package")),
        ({"requirements": ["numpy --pre"]}, ("requirements", "no package")),
        ({"requirements": ["numpy==1 --index-url=http://x"]}, ("requirements", "no package")),
        ({"requirements": ["numpy pandas"]}, ("requirements", "no package")),
        ({"requirements": [" "]}, ("requirements", "no package")),
        ({"requirements": ["a\nb"]}, ("requirements", "control characters")),
        ({"requirements": ["a"] * 101}, ("requirements: 101", "at most 100")),
        ({"requirements": ["a" * 301]}, ("requirements has 301", "at most 300")),
        ({"memory_mib": 0}, ("memory_mib = 0", "from 1")),
        ({"memory_mib": -5}, ("memory_mib = -5",)),
        ({"cpus": NAN}, ("cpus = nan",)),
        ({"cpus": INF}, ("cpus = inf",)),
        ({"cpus": -1.0}, ("cpus = -1",)),
        ({"gpu_slots": -1}, ("gpu_slots = -1",)),
        ({"timeout_s": 0.0}, ("timeout_s = 0",)),
        ({"timeout_s": INF}, ("timeout_s = inf",)),
        ({"deadline_s": NAN}, ("deadline_s = nan",)),
        ({"deadline_s": -1.0}, ("deadline_s = -1",)),
        ({"priority": 0}, ("priority is not set", "NORMAL (2)")),
        ({"priority": 9}, ("priority = 9", "NORMAL (2)")),
        ({"tiers": [1, 0]}, ("tiers is not set", "EDGE (1)")),
        ({"instances_max": 0}, ("instances_max = 0",)),
        ({"keep_alive_s": NAN}, ("keep_alive_s = nan",)),
        ({"budget_usd": -0.1}, ("budget_usd = -0.1",)),
        ({"budget_usd": NAN}, ("budget_usd = nan",)),
        ({"retries_max": 21}, ("retries_max = 21", "from 0 to 20")),
        ({"description": "x" * 1001}, ("description has 1001", "at most 1000")),
        ({"description": "bell\a"}, ("description", "control characters")),
    ],
)
def test_a_spec_with_one_wrong_field_is_refused_by_its_name(
    fields: dict[str, Any], told: tuple[str, ...]
) -> None:
    message = convert.spec_to_pb(SPEC)
    for field, value in fields.items():
        message.ClearField(field)
        if isinstance(value, list):
            getattr(message, field).extend(value)
        else:
            setattr(message, field, value)
    refused(lambda: convert.spec_from_pb(message), *told)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"memory_mib": 2**40}, ("resize",)),
        ({"requirements": (1,)}, ("resize",)),
        ({"requirements": "numpy"}, ("requirements=['numpy']",)),
        ({"description": "\udcff"}, ("resize",)),
    ],
)
def test_a_spec_that_no_message_can_hold_is_refused_in_our_words(
    fields: dict[str, Any], told: tuple[str, ...]
) -> None:
    refused(lambda: convert.spec_to_pb(replace(SPEC, **fields)), *told)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"request_id": ""}, ("request_id", "1 to 128")),
        ({"request_id": "x" * 129}, ("request_id", "1 to 128")),
        ({"request_id": "a\nb"}, ("request_id", "printable")),
        ({"arguments": []}, ("arguments: 0",)),
        ({"arguments": [b""] * 4097}, ("arguments: 4097", "1 to 4096")),
        ({"deadline_s": NAN}, ("deadline_s = nan",)),
        ({"deadline_s": 1e9}, ("deadline_s = 1000000000.0",)),
        ({"timeout_s": INF}, ("timeout_s = inf",)),
        ({"budget_usd": NAN}, ("budget_usd = nan",)),
        ({"budget_usd": -1.0}, ("budget_usd = -1",)),
        ({"priority": 7}, ("priority = 7",)),
        ({"tiers": [4]}, ("tiers = 4", "CLOUD (3)")),
        ({"node_id": "Fog 1"}, ("node_id 'Fog 1'",)),
        ({"data_nodes": ["ok", "../x"]}, ("data_nodes '../x'",)),
        ({"data_nodes": ["n"] * 257}, ("data_nodes: 257", "at most 256")),
        ({"data_bytes": -1}, ("data_bytes = -1",)),
        ({"hops": -1}, ("hops = -1",)),
        ({"lease": -1}, ("lease = -1",)),
    ],
)
def test_a_call_with_one_wrong_field_is_refused_by_its_name(
    fields: dict[str, Any], told: tuple[str, ...]
) -> None:
    refused(lambda: request(**fields), *told)


def test_a_call_of_an_impossible_origin_is_refused() -> None:
    refused(
        lambda: convert.request_from_invocation(invocation(), SPEC, origin=NodeId("a b")),
        "origin 'a b'",
    )


NODE = Node(node_id=HERE, tier=Tier.EDGE, capacity=Resources(cpus=2.0, memory_mib=512))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"node_id": "UP"}, ("node_id 'UP'",)),
        ({"tier": 0}, ("tier is not set", "FOG (2)")),
        ({"tier": 12}, ("tier = 12",)),
        ({"speed": 0.0}, ("speed = 0",)),
        ({"speed": NAN}, ("speed = nan",)),
        ({"address": "nowhere"}, ("address 'nowhere'", "host:port")),
        ({"address": "h:70000"}, ("address 'h:70000'",)),
        ({"address": "h:-1"}, ("address 'h:-1'",)),
        ({"zone": "z\x1b[2J"}, ("zone", "control characters")),
        ({"labels": {"k": "v" * 257}}, ("labels.k has 257",)),
        ({"labels": {f"k{i}": "" for i in range(65)}}, ("labels: 65", "at most 64")),
        ({"capacity": types_pb2.Resources(cpus=NAN)}, ("capacity.cpus = nan",)),
        ({"capacity": types_pb2.Resources(memory_mib=-1)}, ("capacity.memory_mib = -1",)),
        ({"capacity": types_pb2.Resources(gpu_slots=-1)}, ("capacity.gpu_slots = -1",)),
    ],
)
def test_a_node_with_one_wrong_field_is_refused_by_its_name(
    fields: dict[str, Any], told: tuple[str, ...]
) -> None:
    message = convert.node_to_pb(NODE)
    for field in fields:
        message.ClearField(field)
    message.MergeFrom(types_pb2.Node(**fields))
    refused(lambda: convert.node_from_pb(message), *told)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sequence": -1}, ("sequence = -1",)),
        ({"running": -1}, ("running = -1",)),
        ({"queued": -2}, ("queued = -2",)),
        ({"backlog_s": NAN}, ("backlog_s = nan",)),
        ({"backlog_s": -0.1}, ("backlog_s = -0.1",)),
        ({"overtaken_s": [1.0]}, ("overtaken_s has 1 entries", "one per priority")),
        ({"overtaken_s": [0, 0, 0, -1.0]}, ("overtaken_s = -1",)),
        ({"warm": {"resize": 1}}, ("warm 'resize'", "namespace/name@version")),
        ({"engaged": {"default/f@1": -1}}, ("engaged.default/f@1 = -1",)),
        ({"warm": {"default/f@1": -1}}, ("warm.default/f@1 = -1",)),
        ({"eviction_price_s_per_mib": INF}, ("eviction_price_s_per_mib = inf",)),
        ({"free": types_pb2.Resources(cpus=-1.0)}, ("free.cpus = -1",)),
    ],
)
def test_a_reading_with_one_wrong_field_is_refused_by_its_name(
    fields: dict[str, Any], told: tuple[str, ...]
) -> None:
    refused(lambda: convert.reading_from_pb(types_pb2.NodeReading(**fields)), *told)


@pytest.mark.parametrize(
    ("link", "told"),
    [
        ({"rtt_s": NAN}, ("rtt_s = nan",)),
        ({"rtt_s": -1.0}, ("rtt_s = -1",)),
        ({"bandwidth_bytes_per_s": 0.0}, ("bandwidth_bytes_per_s = 0",)),
        ({"bandwidth_bytes_per_s": NAN}, ("bandwidth_bytes_per_s = nan",)),
        ({"jitter_s": INF}, ("jitter_s = inf",)),
    ],
)
def test_a_link_with_one_wrong_field_is_refused_by_its_name(
    link: dict[str, float], told: tuple[str, ...]
) -> None:
    message = types_pb2.Link(**{"bandwidth_bytes_per_s": 1e6, **link})
    refused(lambda: convert.link_from_pb(message), *told)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"request_id": ""}, ("request_id is empty",)),
        ({"function_id": "resize"}, ("function_id 'resize'",)),
        ({"state": 0}, ("state is not set", "OK (1)")),
        ({"state": 77}, ("state = 77",)),
        ({"origin": "a b"}, ("origin 'a b'",)),
        ({"node_id": "a b"}, ("node_id 'a b'",)),
        ({"latency": types_pb2.LatencySplit(run_s=NAN)}, ("run_s = nan",)),
        ({"latency": types_pb2.LatencySplit(queue_s=-2.0)}, ("queue_s = -2",)),
        ({"latency": types_pb2.LatencySplit(return_s=INF)}, ("return_s = inf",)),
        ({"latency": types_pb2.LatencySplit(run_s=INF, queue_s=-INF)}, ("queue_s = -inf",)),
        ({"deadline_s": NAN}, ("deadline_s = nan",)),
        ({"priority": 0}, ("priority is not set",)),
        ({"item_count": -1}, ("item_count = -1",)),
        ({"failed_item_count": 2}, ("failed_item_count = 2", "from 0 to 1")),
        ({"failed_item_count": -1}, ("failed_item_count = -1",)),
        ({"memory_mib": -1}, ("memory_mib = -1",)),
        ({"peak_memory_mib": NAN}, ("peak_memory_mib = nan",)),
        ({"request_bytes": -1}, ("request_bytes = -1",)),
        ({"response_bytes": -1}, ("response_bytes = -1",)),
        ({"money_usd": -1.0}, ("money_usd = -1",)),
        ({"money_usd": NAN}, ("money_usd = nan",)),
        ({"energy_j": INF}, ("energy_j = inf",)),
        ({"gb_s": -1.0}, ("gb_s = -1",)),
        ({"gpu_s": NAN}, ("gpu_s = nan",)),
        ({"cpu_s": INF}, ("cpu_s = inf",)),
        ({"link": "wire"}, ("link 'wire'", "edge-cloud")),
        ({"reason": 99}, ("reason = 99", "QUEUE_FULL (11)")),
        ({"tried": [types_pb2.NodeReason(node_id="n")]}, ("tried.reason is not set",)),
        ({"tried": [types_pb2.NodeReason(reason=1)]}, ("tried.node_id ''",)),
        ({"error_code": "x" * 65}, ("error_code has 65",)),
        ({"policy_id": "x" * 129}, ("policy_id has 129",)),
        ({"lease": -1}, ("lease = -1",)),
    ],
)
def test_an_outcome_with_one_wrong_field_is_refused_by_its_name(
    fields: dict[str, Any], told: tuple[str, ...]
) -> None:
    good = {
        "request_id": "r",
        "function_id": "default/f@1",
        "state": types_pb2.OUTCOME_STATE_OK,
        "origin": HERE,
        "priority": types_pb2.PRIORITY_NORMAL,
        "item_count": 1,
    }
    assert convert.outcome_from_pb(types_pb2.Outcome(**good)).request_id == "r"
    refused(lambda: convert.outcome_from_pb(types_pb2.Outcome(**{**good, **fields})), *told)


@pytest.mark.parametrize("field", CandidateScore._fields[1:])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_candidate_with_a_figure_that_is_none_is_refused_by_its_name(
    field: str, value: float
) -> None:
    row = types_pb2.CandidateScore(**{"node_id": "n", field: value})
    message = types_pb2.Explanation(candidates=[row])
    refused(lambda: convert.explanation_from_pb(message), f"candidates.{field} = {value}")


def test_more_peers_than_any_cluster_has_are_refused() -> None:
    message = node_pb2.View(peers=[node_pb2.PeerView()] * 10_001)
    refused(lambda: convert.view_from_pb(message), "peers: 10001", "at most 10000")


def test_a_long_value_is_not_repeated_in_full() -> None:
    with pytest.raises(InvalidArgument) as caught:
        convert.node_from_pb(types_pb2.Node(node_id="n" * 10_000))
    assert len(caught.value.message) < 300


MESSAGES: list[tuple[Any, Callable[[Any], object]]] = [
    (types_pb2.FunctionSpec, convert.spec_from_pb),
    (types_pb2.FunctionProfile, convert.profile_from_pb),
    (types_pb2.Catalogue, convert.catalogue_from_pb),
    (types_pb2.Node, convert.node_from_pb),
    (types_pb2.NodeReading, convert.reading_from_pb),
    (types_pb2.LinkTable, convert.links_from_pb),
    (node_pb2.View, convert.view_from_pb),
    (types_pb2.Outcome, convert.outcome_from_pb),
    (
        types_pb2.Invocation,
        lambda message: convert.request_from_invocation(message, SPEC, origin=HERE),
    ),
]
numbers = st.sampled_from([NAN, INF, -INF, 0.0, -1.0, 1e300, 1.0])
integers = st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)])
texts = st.sampled_from(["", "a", "A b", "default/f@1", "default/f@0", "/@", "a\0b", "x" * 5000])


def wild(message: Any, draw: Callable[[Any], Any], depth: int = 0) -> Any:
    """Fill a message of any type with values that are legal on the wire and nothing more."""
    for field in message.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        kind = field.cpp_type
        many = field.is_repeated
        if kind == field.CPPTYPE_MESSAGE:
            if field.message_type.GetOptions().map_entry or depth > 2:
                continue
            target = getattr(message, field.name)
            wild(target.add() if many else target, draw, depth + 1)
            continue
        strategy: Any = {
            field.CPPTYPE_DOUBLE: numbers,
            field.CPPTYPE_BOOL: st.booleans(),
            field.CPPTYPE_STRING: st.binary(max_size=3)
            if field.type == field.TYPE_BYTES
            else texts,
        }.get(kind, integers)
        if many:
            getattr(message, field.name).append(draw(strategy))
        else:
            setattr(message, field.name, draw(strategy))
    return message


@pytest.mark.parametrize(("kind", "from_pb"), MESSAGES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_message_is_taken_or_refused_but_never_crashes_its_reader(
    kind: Any, from_pb: Callable[[Any], object], data: st.DataObject
) -> None:
    try:
        from_pb(wild(kind(), data.draw))
    except InvalidArgument as error:
        assert error.message


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=64))
def test_random_bytes_are_no_outcome(content: bytes) -> None:
    with pytest.raises((InvalidArgument, DecodeError)):
        convert.outcome_from_pb(types_pb2.Outcome.FromString(content))

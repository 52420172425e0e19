"""Functions ⇄ protobuf: specs, profiles, the catalogue."""

import re
from collections.abc import Iterable, Mapping, Sequence

from tierwise.domain.function import ALL_TIERS, Catalogue, FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import FunctionId
from tierwise.domain.sizing import MEMORY_MIB_MAX, Growth, Sizing, Term
from tierwise.domain.topology import Tier
from tierwise.errors import InvalidArgument
from tierwise.v1 import types_pb2
from tierwise.wire import checks

FUNCTIONS_MAX = 100_000
REQUIREMENTS_MAX = 100
REQUIREMENT_LENGTH_MAX = 300
DESCRIPTION_LENGTH_MAX = 1_000
TIMEOUT_S_MAX = 7 * 86_400.0  # the longest time that a call may ask for
# A name, extras, versions and a marker: PEP 508 without URLs.
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_VERSION = r"(?:===?|~=|!=|[<>]=?)\s*[A-Za-z0-9.*+!_-]+"
_VERSIONS = rf"{_VERSION}(?:\s*,\s*{_VERSION})*"
_REQUIREMENT = re.compile(
    rf"{_WORD}\s*(?:\[\s*{_WORD}(?:\s*,\s*{_WORD})*\s*\]\s*)?"
    rf"(?:{_VERSIONS}|\(\s*{_VERSIONS}\s*\))?\s*(?:;[\w\s.,'\"()<>=!~+*-]+)?",
    re.ASCII,
)
TARGETS_MAX = 64
_TARGET = re.compile(rf"{_WORD}:([0-9]{{1,5}})", re.ASCII)  # a name or an IPv4 address, a port
_PYTHON = re.compile(r"3\.[0-9]{1,3}", re.ASCII)
INSTANCES_MAX = 10_000
INT32_MAX = 2**31 - 1
TERMS_MAX = 16  # of a sizing
INT64_MAX = 2**63 - 1


def tiers_to_pb(tiers: Iterable[Tier]) -> list[types_pb2.Tier.ValueType]:
    """Return the tiers, nearest first."""
    return [types_pb2.Tier.ValueType(tier) for tier in sorted(tiers)]


def tiers_from_pb(values: Iterable[int], field: str = "tiers") -> frozenset[Tier]:
    """Return the tiers; repetitions count once.

    Raises:
        InvalidArgument: One of them is none.
    """
    return frozenset(checks.member(Tier, value, field) for value in values)


def spec_to_pb(spec: FunctionSpec) -> types_pb2.FunctionSpec:
    """Return the message of a spec.

    Raises:
        InvalidArgument: A field of a hand-made spec is of the wrong type or out of all bounds.
    """
    if isinstance(spec.requirements, str):  # its letters would be taken for packages
        lone = repr(spec.requirements)
        raise InvalidArgument(f"requirements={lone}: write a list, requirements=[{lone}]")
    try:
        return types_pb2.FunctionSpec(
            namespace=spec.namespace,
            name=spec.name,
            version=spec.version,
            code_digest=spec.code_digest,
            requirements=spec.requirements,
            memory_mib=spec.memory_mib,
            cpus=spec.cpus,
            gpu_slots=spec.gpu_slots,
            timeout_s=spec.timeout_s,
            deadline_s=spec.deadline_s,
            priority=types_pb2.Priority.ValueType(spec.priority),
            tiers=tiers_to_pb(spec.tiers),
            instances_max=spec.instances_max,
            keep_alive_s=spec.keep_alive_s,
            budget_usd=spec.budget_usd,
            retries_max=spec.retries_max,
            description=spec.description,
            network=spec.network,
            instances_min=spec.instances_min,
            burst_max=spec.burst_max,
            python_version=spec.python_version,
            is_memory_auto=spec.is_memory_auto,
        )
    except (TypeError, ValueError) as error:  # protobuf's own words do not name the function
        raise InvalidArgument(f"function {checks.shown(str(spec.name))}: {error}") from None


def spec_from_pb(pb: types_pb2.FunctionSpec) -> FunctionSpec:
    """Return the spec of a message; no tiers mean all of them.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    checks.at_most(pb.requirements, "requirements", REQUIREMENTS_MAX)
    for line in pb.requirements:
        _check_requirement(line)
    checks.at_most(pb.network, "network", TARGETS_MAX)
    for target in pb.network:
        _check_target(target)
    instances_max = checks.integer(pb.instances_max, "instances_max", 1, INSTANCES_MAX)
    if pb.python_version and not _PYTHON.fullmatch(pb.python_version):
        raise InvalidArgument(
            f"python_version {checks.shown(pb.python_version)}: write for example 3.11"
        )
    return FunctionSpec(
        namespace=checks.name(pb.namespace, "namespace"),
        name=checks.name(pb.name, "name"),
        version=checks.integer(pb.version, "version", 1, INT32_MAX),
        code_digest=checks.digest(pb.code_digest, "code_digest"),
        requirements=tuple(pb.requirements),
        memory_mib=checks.integer(pb.memory_mib, "memory_mib", 1, MEMORY_MIB_MAX),
        cpus=checks.number(pb.cpus, "cpus", 0.01, 1024),
        gpu_slots=checks.integer(pb.gpu_slots, "gpu_slots", 0, 1024),
        timeout_s=checks.number(pb.timeout_s, "timeout_s", 1e-3, TIMEOUT_S_MAX),
        deadline_s=checks.number(pb.deadline_s, "deadline_s", 1e-3, TIMEOUT_S_MAX),
        priority=checks.member(Priority, pb.priority, "priority"),
        tiers=tiers_from_pb(pb.tiers) or ALL_TIERS,
        instances_max=instances_max,
        instances_min=checks.integer(pb.instances_min, "instances_min", 0, instances_max),
        burst_max=checks.integer(pb.burst_max, "burst_max", 0, INSTANCES_MAX),
        python_version=pb.python_version,
        keep_alive_s=checks.number(pb.keep_alive_s, "keep_alive_s", 0, TIMEOUT_S_MAX),
        budget_usd=checks.number(pb.budget_usd, "budget_usd", 0, 1e9)
        if pb.HasField("budget_usd")
        else None,
        retries_max=checks.integer(pb.retries_max, "retries_max", 0, 20),
        description=checks.text(pb.description, "description", DESCRIPTION_LENGTH_MAX),
        is_memory_auto=pb.is_memory_auto,
        network=tuple(pb.network),
    )


def _check_target(target: str) -> None:
    checks.text(target, "network", REQUIREMENT_LENGTH_MAX)
    match = _TARGET.fullmatch(target)
    if match is None or not 0 < int(match[1]) < 65536:
        raise InvalidArgument(
            f"network: {checks.shown(target)} is no target; write host:port, for example "
            "api.example:443"
        )


def _check_requirement(line: str) -> None:
    """Take names and versions only.

    Options could name another index; URLs and paths would run what no index has.
    """
    checks.text(line, "requirements", REQUIREMENT_LENGTH_MAX)
    if not _REQUIREMENT.fullmatch(line.strip()):
        raise InvalidArgument(
            f"requirements: {checks.shown(line)} is no package; write a name and, if you like, "
            "versions, for example pillow>=11 (no URLs, paths or options of pip)"
        )


def profile_to_pb(profile: FunctionProfile) -> types_pb2.FunctionProfile:
    """Return the message of a profile."""
    return types_pb2.FunctionProfile(
        run_s=profile.run_s,
        cold_start_s=profile.cold_start_s,
        response_bytes=profile.response_bytes,
        rate_per_s=profile.rate_per_s,
        call_count=profile.call_count,
    )


def profile_from_pb(pb: types_pb2.FunctionProfile) -> FunctionProfile:
    """Return the profile of a message.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    return FunctionProfile(
        run_s=checks.number(pb.run_s, "run_s", 0, 1e9),
        cold_start_s=checks.number(pb.cold_start_s, "cold_start_s", 0, 1e9),
        response_bytes=checks.integer(pb.response_bytes, "response_bytes", 0, INT64_MAX),
        rate_per_s=checks.number(pb.rate_per_s, "rate_per_s", 0, 1e9),
        call_count=checks.integer(pb.call_count, "call_count", 0, INT64_MAX),
    )


def profiles_from_pb(
    profiles: Mapping[str, types_pb2.FunctionProfile],
) -> dict[FunctionId, FunctionProfile]:
    """Return profiles by function version.

    Raises:
        InvalidArgument: There are too many, a key is no function version or a field is wrong.
    """
    checks.at_most(profiles, "profiles", FUNCTIONS_MAX)
    return {
        FunctionId(checks.function_id(key, "profiles")): profile_from_pb(value)
        for key, value in profiles.items()
    }


def catalogue_to_pb(catalogue: Catalogue) -> types_pb2.Catalogue:
    """Return the message of a catalogue."""
    return types_pb2.Catalogue(
        revision=catalogue.revision,
        functions=[spec_to_pb(spec) for spec in catalogue.functions.values()],
        profiles={str(key): profile_to_pb(value) for key, value in catalogue.profiles.items()},
        sizings={str(key): sizing_to_pb(value) for key, value in catalogue.sizings.items()},
    )


def catalogue_from_pb(pb: types_pb2.Catalogue) -> Catalogue:
    """Return the catalogue of a message.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    checks.at_most(pb.functions, "functions", FUNCTIONS_MAX)
    specs = [spec_from_pb(spec) for spec in pb.functions]
    return Catalogue(
        revision=checks.integer(pb.revision, "revision", 0, INT64_MAX),
        functions={spec.function_id: spec for spec in specs},
        profiles=profiles_from_pb(pb.profiles),
        sizings={
            FunctionId(checks.function_id(key, "sizings")): sizing_from_pb(value)
            for key, value in pb.sizings.items()
        },
    )


def sizing_to_pb(sizing: Sizing) -> types_pb2.Sizing:
    """Return the message of a sizing."""
    return types_pb2.Sizing(
        memory=_growth_to_pb(sizing.memory),
        run=_growth_to_pb(sizing.run),
        margin=sizing.margin,
        margin_beyond=sizing.margin_beyond,
        highest=sizing.highest,
        sample_count=sizing.sample_count,
    )


def sizing_from_pb(pb: types_pb2.Sizing) -> Sizing:
    """Return the sizing of a message.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    checks.at_most(pb.highest, "highest", TERMS_MAX)
    return Sizing(
        memory=_growth_from_pb(pb.memory, "memory"),
        run=_growth_from_pb(pb.run, "run"),
        margin=checks.number(pb.margin, "margin", 0, 1e6),
        margin_beyond=checks.number(pb.margin_beyond, "margin_beyond", 0, 1e6),
        highest={
            name: checks.number(value, f"highest.{name}", -1e15, 1e15)
            for name, value in pb.highest.items()
        },
        sample_count=checks.integer(pb.sample_count, "sample_count", 0, INT64_MAX),
    )


def _growth_to_pb(growth: Growth) -> list[types_pb2.SizingTerm]:
    return [
        types_pb2.SizingTerm(
            coefficient=term.coefficient,
            factors=[
                types_pb2.SizingFactor(measure=name, power=power) for name, power in term.powers
            ],
        )
        for term in growth.terms
    ]


def _growth_from_pb(terms: Sequence[types_pb2.SizingTerm], field: str) -> Growth:
    checks.at_most(terms, field, TERMS_MAX)
    found = []
    for term in terms:
        checks.at_most(term.factors, f"{field}.factors", TERMS_MAX)
        powers = tuple(
            (factor.measure, checks.number(factor.power, f"{field}.power", 0, 8))
            for factor in term.factors
        )
        coefficient = checks.number(term.coefficient, f"{field}.coefficient", 0, 1e12)
        found.append(Term(powers=powers, coefficient=coefficient))
    return Growth(terms=tuple(found))

"""Keeps what calls teach of memory, fits it anew when due, and gives advice. Serves AdvisorService.

The samples are rebuilt from the stored call records at start: there is no second store. Versions
of a function that have the same code share them.
"""

# ruff: noqa: D102, N802 - gRPC methods are named and described by the protos

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy import select

from scheduler.advisors.memory import SAMPLES_MAX, Drift, Sample, fit, guess, recommend
from scheduler.catalogue import FunctionCatalogue
from scheduler.store.store import Store
from scheduler.store.tables import calls
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import FunctionId
from tierwise.domain.outcome import Outcome, OutcomeState
from tierwise.domain.sizing import MEMORY_MIB_MAX, RETRY_FACTOR, Sizing
from tierwise.errors import FailedPrecondition, FunctionOutOfMemory, InvalidArgument, NotFound
from tierwise.v1 import advisor_pb2, advisor_pb2_grpc, types_pb2
from tierwise.wire import checks, convert

log = structlog.get_logger()

OUT_OF_MEMORY = FunctionOutOfMemory.code
FIT_INTERVAL_S = 1.0
FITS_PER_ROUND_MAX = 20
CODES_MAX = 500  # functions that are learnt about
RECORDS_READ_MAX = 5000
NEW_SHARE = 0.1  # of the samples, after which a fit is due
NEW_MIN = 4
DRIFT_KEPT = 32  # newest samples that stay when there is drift


@dataclass(slots=True)
class _Record:
    """What is known of one code under one name."""

    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))
    drift: Drift = field(default_factory=Drift)
    sizing: Sizing | None = None
    new_count: int = 0
    is_due: bool = False


class Sizings(advisor_pb2_grpc.AdvisorServiceServicer):
    """Learns how the memory of functions follows their input.

    Only those whose memory is chosen per call are fitted as calls come in.
    """

    def __init__(self, store: Store, functions: FunctionCatalogue) -> None:
        """Learn from the newest stored calls.

        Args:
            store: Holds the records of calls.
            functions: What is declared; told when there is something new for agents.
        """
        self._functions = functions
        self._records: OrderedDict[tuple[str, str, str], _Record] = OrderedDict()
        query = select(calls.c.outcome).order_by(calls.c.sequence.desc()).limit(RECORDS_READ_MAX)
        for blob in reversed(store.read_now(lambda c: c.execute(query).scalars().all())):
            try:
                outcome = convert.outcome_from_pb(types_pb2.Outcome.FromString(blob))
            except InvalidArgument as error:
                log.warning("call.not_learnt", cause=str(error))
                continue
            self.learn(outcome, 1.0)  # the speed of a node then is not stored
        for record in self._records.values():
            if record.is_due:  # agents that connect are told at once
                samples = list(record.samples)
                record.sizing = fit(samples) or guess(samples)
                record.is_due, record.new_count = False, 0

    def learn(self, outcome: Outcome, speed: float | None) -> None:
        """Take in one call that has ended; those that tell nothing are ignored.

        Args:
            outcome: How it ended.
            speed: Of the node that ran it; None if that is unknown.
        """
        is_out_of_memory = outcome.error_code == OUT_OF_MEMORY
        has_ended = outcome.state is OutcomeState.OK and outcome.peak_memory_mib > 0.0
        spec = self._spec(outcome.function_id)
        if spec is None or not outcome.measures or not (has_ended or is_out_of_memory):
            return
        peak_mib = outcome.peak_memory_mib
        if is_out_of_memory:
            peak_mib = max(peak_mib, float(RETRY_FACTOR * outcome.memory_mib))
        record = self._record(spec)
        if has_ended and record.sizing is not None:
            predicted_mib = record.sizing.memory.at(outcome.measures)
            if record.drift.saw(peak_mib, predicted_mib):
                log.info("memory.drifted", function=outcome.function_id)
                kept = list(record.samples)[-DRIFT_KEPT:]
                record.samples.clear()
                record.samples.extend(kept)
                record.is_due = True
        record.samples.append(
            Sample(
                measures=outcome.measures,
                peak_mib=peak_mib,
                run_s=outcome.latency.run_s * (speed or 1.0) / max(1, outcome.item_count),
                is_out_of_memory=is_out_of_memory,
            )
        )
        record.new_count += 1
        has_run_out = is_out_of_memory or outcome.retried_gb_s > 0.0
        enough = max(NEW_MIN, NEW_SHARE * len(record.samples))
        if spec.is_memory_auto:  # what is declared is looked at when somebody asks
            record.is_due |= has_run_out or record.new_count >= enough

    def sizing(self, function: FunctionId) -> Sizing | None:
        """Return what agents may know of a function; None if its memory is declared."""
        spec = self._spec(function)
        if spec is None or not spec.is_memory_auto:
            return None
        record = self._records.get(_key(spec))
        found = record.sizing if record is not None else None
        if record is not None and found is None and record.samples:
            record.is_due = True  # its memory was declared until now
        if found is not None and not found.highest:  # the same for all inputs: a first guess
            return found if (found.memory_mib({}) or 0) > spec.memory_mib else None
        return found

    async def fit_forever(self) -> None:
        """Fit what is due, once a second, and have agents told."""
        while True:
            await asyncio.sleep(FIT_INTERVAL_S)
            due = [r for r in self._records.values() if r.is_due][:FITS_PER_ROUND_MAX]
            for record in due:
                record.is_due, record.new_count = False, 0
                samples = list(record.samples)
                found = await asyncio.to_thread(fit, samples)
                record.sizing = found or guess(samples)
                record.drift = Drift()  # its errors are those of another prediction now
            if due:
                self._functions.sizings_changed()

    # -- RPCs -----------------------------------------------------------------------------------

    async def RecommendMemory(
        self, request: advisor_pb2.RecommendMemoryRequest, context: Any
    ) -> advisor_pb2.RecommendMemoryResponse:
        spec = self._functions.find(request.function)
        record = self._records.get(_key(spec))
        samples = list(record.samples) if record is not None else []
        found = await asyncio.to_thread(recommend, samples, spec.memory_mib)
        if found is None:
            raise FailedPrecondition(
                f"only {len(samples)} calls of {spec.function_id} are on record: make some more, "
                "or run `tierwise profile` with typical inputs"
            )
        p50, p95, p99, most = found.peaks_mib
        return advisor_pb2.RecommendMemoryResponse(
            spec=convert.spec_to_pb(spec),
            sample_count=found.sample_count,
            out_of_memory_count=found.out_of_memory_count,
            peak_mib_p50=p50,
            peak_mib_p95=p95,
            peak_mib_p99=p99,
            peak_mib_max=most,
            is_memory_auto=found.is_auto,
            memory_mib=found.memory_mib,
            out_of_memory_share=found.out_of_memory_share,
            gb_s_declared=found.gb_s_declared,
            gb_s_recommended=found.gb_s_auto if found.is_auto else found.gb_s_fixed,
            fixed_memory_mib=found.memory_mib,
            gb_s_fixed=found.gb_s_fixed,
            sizing=convert.sizing_to_pb(found.sizing) if found.sizing is not None else None,
        )

    async def ResizeFunction(
        self, request: advisor_pb2.ResizeFunctionRequest, context: Any
    ) -> advisor_pb2.ResizeFunctionResponse:
        spec = self._functions.find(request.function)
        memory_mib = request.memory_mib or spec.memory_mib
        checks.integer(memory_mib, "memory_mib", 1, MEMORY_MIB_MAX)
        spec, is_new = await self._functions.resize(
            spec, memory_mib=memory_mib, is_memory_auto=request.is_memory_auto
        )
        return advisor_pb2.ResizeFunctionResponse(spec=convert.spec_to_pb(spec), is_new=is_new)

    def _spec(self, function: FunctionId) -> FunctionSpec | None:
        try:
            return self._functions.find(function)
        except NotFound:
            return None

    def _record(self, spec: FunctionSpec) -> _Record:
        key = _key(spec)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record()
            if len(self._records) > CODES_MAX:
                self._records.popitem(last=False)
        self._records.move_to_end(key)
        return record


def _key(spec: FunctionSpec) -> tuple[str, str, str]:
    return spec.namespace, spec.name, spec.code_digest

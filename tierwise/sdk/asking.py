"""Questions to the rounds of a job, answered from statistics or by a function where the data is."""

from typing import TYPE_CHECKING, Any

from tierwise.domain.cache import ObjectKind
from tierwise.errors import FunctionRaised, InvalidArgument, NotFound, RetryLater
from tierwise.functions.fl.question import Question
from tierwise.functions.fl.questions import find
from tierwise.sdk.app import App
from tierwise.sdk.cached import CachedArray
from tierwise.v1 import cache_pb2
from tierwise.wire import payload

if TYPE_CHECKING:
    from tierwise.sdk.rounds import Rounds

MEMORY_MIB_MIN = 256
VECTORS_COPIED = 8  # float32 vectors that a question may hold beside its inputs
TIMEOUT_S = 300.0


class Asking:
    """Asks for one job."""

    def __init__(self, rounds: "Rounds") -> None:
        self._rounds = rounds
        self._apps: dict[str, App] = {}

    async def ask(self, question: str, *, round: int = -1, **arguments: Any) -> Any:
        """Return the answer to a question about the rounds of the job.

        Args:
            question: Its name, such as cosine or krum; `tierwise fl ask --help` lists them.
            round: Which round; −1: the newest that has ended or is complete.
            **arguments: What the question takes.

        Raises:
            InvalidArgument: There is no such question, or it takes other arguments.
            NotFound: There is no such round.
        """
        try:
            found = find(question)
            arguments = found.checked(arguments)
        except ValueError as error:
            raise InvalidArgument(str(error)) from None
        if found.needs == "statistics":
            return (await self._statistics(found.name, round, arguments))[0]
        facts, response = await self._statistics("round", round, {})
        inputs = [await self._input(name, response, facts, arguments) for name in found.inputs]
        return await self._run(found, response, inputs, facts, arguments)

    async def _statistics(
        self, question: str, number: int, arguments: dict[str, Any]
    ) -> tuple[Any, cache_pb2.AskStatisticsResponse]:
        rounds = self._rounds
        try:
            blob = payload.encode(arguments, "arguments")
        except payload.PayloadError as error:
            raise InvalidArgument(str(error)) from None
        request = cache_pb2.AskStatisticsRequest(
            namespace=rounds.namespace,
            job=rounds.job,
            round=number,
            question=question,
            arguments=blob,
        )
        caches = rounds.client().connection().caches
        response: cache_pb2.AskStatisticsResponse = await caches.ask(
            rounds.node, "AskStatistics", request
        )
        return payload.decode(response.answer), response

    async def _input(
        self,
        name: str,
        response: cache_pb2.AskStatisticsResponse,
        facts: dict[str, Any],
        arguments: dict[str, Any],
    ) -> CachedArray | None:
        """Return what stands for an array that a question reads, None if there is none."""
        number, client = response.round, arguments.get("client", "")
        kind = ObjectKind.UPDATE if name == "update" or (name == "model" and client) else None
        if name == "matrix":
            kind, client = ObjectKind.MATRIX, ""
        elif kind is None:
            kind, client = ObjectKind.AGGREGATE, ""
        try:
            if name == "base":
                number = await self._base(number, str(facts["base_digest"]))
            found = await self._rounds.ref.aio(number, kind.value, client)
        except NotFound:
            return None
        return CachedArray(found.key, found.shape, response.node_id)

    async def _base(self, number: int, digest: str) -> int:
        """Return the round whose aggregate has a digest; most often it is the one before.

        Raises:
            NotFound: The round has no base, or nobody holds it.
        """
        if digest and number > 0:
            before = await self._rounds.info.aio(number - 1)
            if before.digest == digest:
                return number - 1
        for row in await self._rounds.list.aio() if digest else ():
            if row["kind"] == ObjectKind.AGGREGATE.value and row["digest"] == digest:
                return int(row["round"])
        raise NotFound(f"the base of round {number} is not held any more")

    async def _run(
        self,
        question: Question,
        response: cache_pb2.AskStatisticsResponse,
        inputs: list[CachedArray | None],
        facts: dict[str, Any],
        arguments: dict[str, Any],
    ) -> Any:
        """Run the question where its inputs lie; elsewhere if there is no room."""
        largest = max((each.shape[-1] for each in inputs if each is not None), default=0)
        function = self._function(question, 4 * largest)
        there = function.options(node=response.node_id)
        try:
            try:
                return await there.remote.aio(*inputs, facts=facts, **arguments)
            except RetryLater:
                return await function.remote.aio(*inputs, facts=facts, **arguments)
        except FunctionRaised as error:
            if error.remote_type == "ValueError":  # how questions say that they are asked wrongly
                raise InvalidArgument(f"{question.name}: {error.message}") from None
            raise

    def _function(self, question: Question, vector_bytes: int) -> Any:
        """Return the question as a function with memory for vectors of such a size."""
        needed_mib = MEMORY_MIB_MIN + VECTORS_COPIED * (vector_bytes >> 20)
        memory_mib = 1 << (needed_mib - 1).bit_length()  # few sizes, so few versions
        app = self._apps.get(question.name)
        if app is None:
            client = self._rounds.client()
            app = App("fl", namespace=self._rounds.namespace, client=client)
            self._apps[question.name] = app
        name = f"fl-{question.name}-{memory_mib}"
        known = app.functions.get(name)
        if known is None:
            known = app.function(
                question.function,
                name=name,
                memory=memory_mib,
                timeout=TIMEOUT_S,
                deadline=TIMEOUT_S,
            )
        return known

"""Errors ⇄ gRPC status and items, over real servers on loopback."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tierwise.errors import (
    ERROR_BY_CODE,
    STATUS_BY_CODE,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FunctionRaised,
    InvalidArgument,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    TierwiseError,
    Unauthenticated,
    Unavailable,
    Unplaceable,
)
from tierwise.v1 import types_pb2
from tierwise.wire.channel import new_server
from tierwise.wire.errors import (
    DETAIL_KEY,
    ErrorInterceptor,
    error_from_item,
    error_from_rpc,
    item_from_error,
    status_of,
)

KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]


def tree(root: type[TierwiseError]) -> list[type[TierwiseError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in tree(child))]


class Echo:
    """A server with one method of each kind, which does what the test says; bytes in and out."""

    def __init__(self, behaviour: Callable[..., Any], service: str = "tierwise.test.Echo") -> None:
        self.service = service
        handlers = {kind: getattr(grpc, f"{kind}_rpc_method_handler")(behaviour) for kind in KINDS}
        self.server = new_server([ErrorInterceptor()])
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, handlers),)
        )
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    async def call(self, kind: str, options: list[tuple[str, Any]] | None = None) -> list[bytes]:
        """Call one method, with gRPC's own limits; return the responses."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options) as channel:
            call = getattr(channel, kind)(f"/{self.service}/{kind}")
            request = iter([b"x"]) if kind.startswith("stream") else b"x"
            answered = call(request, timeout=5)
            if kind.endswith("stream"):
                return [response async for response in answered]
            return [await answered]

    async def failure(self, kind: str = "unary_unary") -> TierwiseError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(kind)
        return error_from_rpc(caught.value)


@asynccontextmanager
async def serving(behaviour: Callable[..., Any], **options: Any) -> AsyncIterator[Echo]:
    echo = Echo(behaviour, **options)
    await echo.server.start()
    try:
        yield echo
    finally:
        await echo.server.stop(None)


def raising(error: Exception) -> Callable[[Any, Any], Awaitable[bytes]]:
    async def behaviour(request: Any, context: Any) -> bytes:
        raise error

    return behaviour


# -- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tree(TierwiseError))
def test_every_error_has_a_status_that_grpc_knows(kind: type[TierwiseError]) -> None:
    assert isinstance(status_of(kind("x")), grpc.StatusCode)


def test_the_table_names_no_code_that_no_error_has() -> None:
    assert set(STATUS_BY_CODE) == set(ERROR_BY_CODE) == {kind.code for kind in tree(TierwiseError)}
    assert set(STATUS_BY_CODE.values()) <= set(grpc.StatusCode.__members__)


# -- over the wire --------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(ERROR_BY_CODE))
async def test_an_error_arrives_as_itself(code: str) -> None:
    sent = ERROR_BY_CODE[code](
        "what was wrong — and why",
        remote_type="ValueError",
        remote_traceback='File "f.py", line 1\nValueError: ü',
        retry_after_s=0.25,
    )
    async with serving(raising(sent)) as echo:
        arrived = await echo.failure()
    assert type(arrived) is ERROR_BY_CODE[code]
    assert arrived.message == sent.message
    assert (arrived.remote_type, arrived.retry_after_s) == ("ValueError", 0.25)
    assert arrived.remote_traceback == sent.remote_traceback


@pytest.mark.parametrize("kind", KINDS)
async def test_methods_of_every_kind_turn_errors_into_statuses(kind: str) -> None:
    async with serving(raising(Unplaceable("no node", retry_after_s=2.0))) as echo:
        arrived = await echo.failure(kind)
    assert isinstance(arrived, Unplaceable)
    assert arrived.retry_after_s == 2.0


@pytest.mark.parametrize("kind", ["unary_stream", "stream_stream"])
async def test_a_generator_may_answer_first_and_fail_then(kind: str) -> None:
    is_closed = asyncio.Event()

    async def behaviour(request: Any, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"1"
            yield b"2"
            raise NotFound("no third")
        finally:
            is_closed.set()

    async with serving(behaviour) as echo:
        arrived = await echo.failure(kind)
    assert isinstance(arrived, NotFound)
    assert is_closed.is_set()


@pytest.mark.parametrize("kind", KINDS)
async def test_what_does_not_fail_passes_unchanged(kind: str) -> None:
    async def behaviour(request: Any, context: Any) -> bytes | None:
        if kind.endswith("stream"):
            await context.write(b"1")
            await context.write(b"2")
            return None
        return b"1"

    async with serving(behaviour) as echo:
        assert await echo.call(kind) == ([b"1", b"2"] if kind.endswith("stream") else [b"1"])


async def test_an_error_out_of_a_task_group_is_still_that_error() -> None:
    async def behaviour(request: Any, context: Any) -> bytes:
        async with asyncio.TaskGroup() as group:
            group.create_task(raising(Overloaded("full"))(request, context))
        return b""

    async with serving(behaviour) as echo:
        assert isinstance(await echo.failure(), Overloaded)


@pytest.mark.parametrize(
    "bug",
    [ZeroDivisionError("a secret"), ExceptionGroup("g", [NotFound("n"), KeyError("a secret")])],
)
async def test_a_bug_is_logged_with_its_traceback_and_stays_unknown(bug: Exception) -> None:
    with capture_logs() as logs:
        async with serving(raising(bug)) as echo:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await echo.call("unary_unary")
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert "secret" not in (caught.value.details() or "")
    arrived = error_from_rpc(caught.value)
    assert (type(arrived), arrived.code) == (TierwiseError, "internal")
    (entry,) = logs
    assert (entry["event"], entry["log_level"]) == ("rpc.crashed", "error")
    assert entry["method"] == "/tierwise.test.Echo/unary_unary"
    assert entry["exc_info"] is bug


async def test_a_caller_that_goes_away_is_no_bug() -> None:
    is_cancelled = asyncio.Event()

    async def behaviour(request: Any, context: Any) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()
        return b""

    with capture_logs() as logs:
        async with serving(behaviour) as echo:
            call = asyncio.ensure_future(echo.call("unary_stream"))
            await asyncio.sleep(0.1)
            call.cancel()
            async with asyncio.timeout(5):
                await is_cancelled.wait()
    assert logs == []


async def test_services_of_others_are_left_alone() -> None:
    async with serving(raising(NotFound("x")), service="other.Service") as echo:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await echo.call("unary_unary")
    assert DETAIL_KEY not in dict(caught.value.trailing_metadata() or ())


@pytest.mark.parametrize("letter", ["x", "€", "😀", "%", "\n", "\udcff"])
async def test_the_longest_error_fits_into_the_trailer_of_any_client(letter: str) -> None:
    sent = FunctionRaised(
        letter * 50_000, remote_type=letter * 5_000, remote_traceback=letter * 50_000 + "the end"
    )
    async with serving(raising(sent)) as echo:
        arrived = await echo.failure()
    assert isinstance(arrived, FunctionRaised)
    assert len(arrived.message) > 100
    assert arrived.message[0] == letter.encode("utf-8", "replace").decode()
    assert arrived.remote_traceback.endswith("the end")  # the cause is at the end


# -- statuses of others ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgument),
        (grpc.StatusCode.OUT_OF_RANGE, InvalidArgument),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, AlreadyExists),
        (grpc.StatusCode.FAILED_PRECONDITION, FailedPrecondition),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.ABORTED, Unavailable),
        (grpc.StatusCode.UNKNOWN, TierwiseError),
        (grpc.StatusCode.INTERNAL, TierwiseError),
        (grpc.StatusCode.DATA_LOSS, TierwiseError),
    ],
)
async def test_a_status_without_our_detail_is_the_nearest_error(
    status: grpc.StatusCode, kind: type[TierwiseError]
) -> None:
    async def behaviour(request: Any, context: Any) -> None:
        await context.abort(status, "their words")

    async with serving(behaviour) as echo:
        arrived = await echo.failure()
    assert type(arrived) is kind
    assert "their words" in arrived.message


@pytest.mark.parametrize("detail", [b"", b"\xff\x00garbage", b"\x91\x01", b"\x80"])
async def test_a_detail_that_is_nonsense_leaves_the_status(detail: bytes) -> None:
    async def behaviour(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "gone", ((DETAIL_KEY, detail),))

    async with serving(behaviour) as echo:
        assert isinstance(await echo.failure(), NotFound)


async def test_a_method_that_is_not_there_hints_at_another_version() -> None:
    async with serving(raising(NotFound("x"))) as echo:
        echo.service = "tierwise.v9.Other"
        arrived = await echo.failure()
    assert isinstance(arrived, FailedPrecondition)
    assert "version" in arrived.message


async def test_a_message_over_the_limit_says_to_send_less() -> None:
    async def behaviour(request: Any, context: Any) -> bytes:
        return b"x" * (5 << 20)  # more than the 4 MiB of a client without our options

    async with serving(behaviour) as echo:
        arrived = await echo.failure()
    assert isinstance(arrived, PayloadTooLarge)
    assert "send less" in arrived.message


async def test_a_port_where_nobody_listens_is_unavailable_and_no_matter_of_certificates() -> None:
    async with serving(raising(NotFound("x"))) as echo:
        pass
    arrived = await echo.failure()
    assert isinstance(arrived, Unavailable)
    assert "certificate" not in arrived.message


async def test_a_deadline_that_passes_is_told_as_such() -> None:
    async def behaviour(request: Any, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    async with serving(behaviour) as echo:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{echo.port}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/tierwise.test.Echo/unary_unary")(b"", timeout=0.1)
        await channel.close()
    assert isinstance(error_from_rpc(caught.value), DeadlineExceeded)


async def test_the_synchronous_client_understands_the_same_errors() -> None:
    async with serving(raising(Overloaded("full", retry_after_s=1.5))) as echo:

        def call() -> TierwiseError:
            with grpc.insecure_channel(f"127.0.0.1:{echo.port}") as channel:
                try:
                    channel.unary_unary("/tierwise.test.Echo/unary_unary")(b"", timeout=5)
                except grpc.RpcError as error:
                    return error_from_rpc(error)
            raise AssertionError

        arrived = await asyncio.to_thread(call)
    assert isinstance(arrived, Overloaded)
    assert arrived.retry_after_s == 1.5


def test_an_rpc_error_without_a_status_is_internal() -> None:
    assert error_from_rpc(grpc.RpcError("odd")).code == "internal"


# -- items ----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    code=st.sampled_from(sorted(ERROR_BY_CODE)),
    message=st.text(max_size=50),
    remote_type=st.text(max_size=20),
    traceback=st.text(max_size=200),
    retry_after_s=st.none() | st.floats(0.001, 1e6),
)
def test_an_error_in_an_item_comes_back_as_itself(
    code: str, message: str, remote_type: str, traceback: str, retry_after_s: float | None
) -> None:
    sent = ERROR_BY_CODE[code](
        message,
        remote_type=remote_type,
        remote_traceback=traceback,
        retry_after_s=retry_after_s,
    )
    arrived = error_from_item(types_pb2.Item.FromString(item_from_error(sent).SerializeToString()))
    assert arrived is not None
    assert type(arrived) is ERROR_BY_CODE[code]
    assert (arrived.message, arrived.remote_type) == (message, remote_type)
    assert (arrived.remote_traceback, arrived.retry_after_s) == (traceback, retry_after_s)


def test_a_value_is_no_error() -> None:
    assert error_from_item(types_pb2.Item(value=b"")) is None


def test_an_error_of_a_newer_version_is_not_lost() -> None:
    arrived = error_from_item(types_pb2.Item(error_code="from_the_future", message="m"))
    assert type(arrived) is TierwiseError
    assert arrived.message == "m"


@pytest.mark.parametrize("letter", ["x", "€", "\udcff"])
def test_an_item_stays_small_and_keeps_the_end_of_the_traceback(letter: str) -> None:
    item = item_from_error(
        FunctionRaised(
            letter * 10**6, remote_type=letter * 10**6, remote_traceback=letter * 10**6 + "the end"
        )
    )
    assert item.ByteSize() < 40_000
    assert item.remote_traceback.endswith("the end")

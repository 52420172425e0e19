"""Functions as their authors write them."""

import atexit
import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tierwise.config import parse_duration_s, parse_memory_mib, python_version
from tierwise.domain.function import ALL_TIERS, FunctionSpec, Priority
from tierwise.domain.ids import is_name
from tierwise.errors import InvalidArgument
from tierwise.sdk import wasm
from tierwise.sdk.client import Client, default_client
from tierwise.sdk.code import pack
from tierwise.sdk.connection import Options
from tierwise.sdk.remote import RemoteFunction, parse_priority, parse_tiers
from tierwise.sdk.verb import Verb
from tierwise.wire import convert


class Function(RemoteFunction):
    """A function with its code: calling it runs it here, `.remote` runs it on the cluster.

    It is deployed at its first remote use, and again whenever code or declaration have changed.
    """

    def __init__(
        self,
        app: "App",
        code: Callable[..., Any],
        spec: FunctionSpec,
        options: Options | None = None,
    ) -> None:
        super().__init__(app.client, f"{spec.namespace}/{spec.name}", options)
        self.app = app
        self.code = code
        self.spec = spec
        self.deploy: Verb[[], FunctionSpec] = Verb(app.client, self._deploy)
        self._packed: bytes | None = None
        self._deployed: tuple[Client, FunctionSpec] | None = None
        self._here: Callable[..., Any] | None = None if isinstance(code, type) else code
        functools.update_wrapper(self, code, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function in this process."""
        return self.local(*args, **kwargs)

    def local(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function in this process; a class is entered at its first call here."""
        if self._here is None:
            self._here = _entered(self.code)
        return self._here(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Travel as the plain function, so that functions can call each other in a worker."""
        return operator.itemgetter(0), ((self.code,),)  # nothing of tierwise: workers lack it

    async def resolve(self) -> tuple[str, FunctionSpec | None]:
        """Deploy if need be; return the exact version."""
        spec = await self._deploy()
        return spec.function_id, spec

    def resolved(self) -> tuple[str, FunctionSpec | None] | None:
        """Return the exact version if it is deployed, else None."""
        if self._deployed is None or self._deployed[0] is not self.app.client():
            return None
        spec = self._deployed[1]
        return spec.function_id, spec

    def forget(self) -> bool:
        """Forget the deployed version, so that the next call deploys again."""
        self.app.client().forget()
        self._deployed = None
        return True

    def _with(self, options: Options) -> RemoteFunction:
        changed = Function(self.app, self.code, self.spec, options)
        changed._packed = self._packed
        changed._deployed = self._deployed
        return changed

    async def _deploy(self) -> FunctionSpec:
        client = self.app.client()
        if self._deployed is None or self._deployed[0] is not client:
            if self._packed is None:
                self._packed = pack(self.code)
            self._deployed = client, await client.deploy(self.spec, self._packed)
        return self._deployed[1]


class App:
    """A group of functions that belong together: `app = tierwise.App("vision")`."""

    def __init__(
        self, name: str = "app", *, namespace: str = "default", client: Client | None = None
    ) -> None:
        """Make an app.

        Args:
            name: For people; functions are named by themselves.
            namespace: Where its functions live and are billed.
            client: The cluster to use; default: that of `tierwise.connect`, or the usual context.

        Raises:
            InvalidArgument: A name is none.
        """
        for label, text in (("name", name), ("namespace", namespace)):
            if not is_name(text):
                raise InvalidArgument(f"{label} {text!r}: use a-z, 0-9, '-', '.', '_'")
        self.name = name
        self.namespace = namespace
        self.functions: dict[str, Function] = {}
        self._client = client
        self.deploy: Verb[[], list[FunctionSpec]] = Verb(self.client, self._deploy)

    def client(self) -> Client:
        """Return the client that this app's functions use."""
        return self._client or default_client()

    def use(self, client: Client) -> None:
        """Use this client from now on."""
        self._client = client

    def function(
        self,
        code: Callable[..., Any] | None = None,
        *,
        name: str = "",
        memory: str | int = "256MiB",
        cpus: float = 1.0,
        gpu: int = 0,
        deadline: str | float = "1s",
        timeout: str | float = "60s",
        priority: str | Priority = "normal",
        tier: str | Iterable[str] | None = None,
        requirements: Iterable[str] = (),
        min_instances: int = 0,
        max_instances: int = 16,
        burst: int = 0,
        keep_alive: str | float = "5m",
        budget_usd: float | None = None,
        retries: int = 2,
        network: Iterable[str] = (),
    ) -> Any:
        """Declare a function. Use as `@app.function` or `@app.function(memory="1GiB", …)`.

        A class may stand for a function that needs something loaded once: each instance makes one
        object of it, calls its `enter()` if it has one, then the object itself for every call, and
        its `exit()` when it is stopped, which may take two seconds.

        Args:
            code: The function or class, when used without parentheses.
            name: Default: the function's name in small letters, with `_` as `-`.
            memory: What one call may use; it is killed beyond that. "auto" gives each call what
                its input needs, learnt from the calls before; one that runs out of memory all the
                same runs once more with twice as much.
            cpus: What one running call takes.
            gpu: GPU slots that one running call takes.
            deadline: How soon a result should be there; placement works for it, misses count.
            timeout: A call that runs longer is killed.
            priority: low, normal, high or critical.
            tier: Where it may run: edge, fog, cloud or several; default: anywhere.
            requirements: Packages that pip installs, ["pillow>=11"]; none means those of the
                agent's host.
            min_instances: Kept ready on every node that may run it, restarts included; their
                memory is not for others.
            max_instances: At most this many at a time on one node.
            burst: At most this many start per second on one node; 0 means no cap.
            keep_alive: How long an idle instance is kept warm.
            budget_usd: Nodes where one call would cost more are not used.
            retries: How often durable work is tried again when the platform fails it.
            network: What it may reach over TCP, ["api.example:443"]; default: nothing.

        Raises:
            InvalidArgument: A value is not understood.
        """

        def declare(function: Callable[..., Any]) -> Function:
            _check_kind(function)
            spec = FunctionSpec(
                namespace=self.namespace,
                name=name or function.__name__.lower().replace("_", "-").strip("-"),
                version=1,
                code_digest="",
                requirements=_listed(requirements, "requirements"),
                network=_listed(network, "network"),
                memory_mib=parse_memory_mib("256MiB" if memory == "auto" else memory),
                cpus=cpus,
                gpu_slots=gpu,
                timeout_s=parse_duration_s(timeout),
                deadline_s=parse_duration_s(deadline),
                priority=parse_priority(priority),
                tiers=parse_tiers(tier) if tier is not None else ALL_TIERS,
                instances_max=max_instances,
                instances_min=min_instances,
                burst_max=burst,
                python_version=python_version(),
                keep_alive_s=parse_duration_s(keep_alive),
                budget_usd=budget_usd,
                retries_max=retries,
                is_memory_auto=memory == "auto",
                description=(function.__doc__ or "").strip().partition("\n")[0],
            )
            convert.spec_from_pb(convert.spec_to_pb(spec))  # the scheduler's checks, early
            made = Function(self, function, spec)
            self.functions[spec.name] = made
            return made

        return declare if code is None else declare(code)

    def wasm(
        self,
        module: str | Path | bytes,
        export: str = "",
        *,
        name: str = "",
        fuel: int = 1_000_000_000,
        wasm_memory: str | int = "16MiB",
        requirements: Iterable[str] = (wasm.REQUIREMENT,),
        **options: Any,
    ) -> Function:
        """Declare an exported function of a WebAssembly module, which takes and returns numbers.

        Args:
            module: A .wasm file, or its bytes.
            export: Which function; may be left out if there is one only, and wasmtime is here.
            name: Default: that of the export.
            fuel: About how many instructions a call may execute; more is an error.
            wasm_memory: What the module's own memory may grow to.
            requirements: What its workers need; none means that nodes have wasmtime already.
            **options: Those of `function`.

        Raises:
            InvalidArgument: It is no module, has no such export, or wants imports.
        """
        code = module if isinstance(module, bytes) else Path(module).read_bytes()
        if not export:
            found = wasm.exports(code)
            if len(found) != 1:
                raise InvalidArgument(
                    f"the module exports {', '.join(found) or 'nothing'}: name one"
                )
            export = found[0]
        memory_bytes = parse_memory_mib(wasm_memory) << 20
        made = wasm.as_class(code, export, fuel=fuel, memory_bytes=memory_bytes)
        name = name or export.lower().replace("_", "-").strip("-")
        declared: Function = self.function(name=name, requirements=requirements, **options)(made)
        return declared

    async def _deploy(self) -> list[FunctionSpec]:
        """Deploy every function of the app; return their exact versions."""
        return [await function.deploy.aio() for function in self.functions.values()]


def _listed(values: Iterable[str], name: str) -> tuple[str, ...]:
    """Return the values; one that stands alone has to be in a list.

    Raises:
        InvalidArgument: It is a text, whose letters would be taken for values.
    """
    if isinstance(values, str):
        raise InvalidArgument(f"{name}={values!r}: write a list, {name}=[{values!r}]")
    return tuple(values)


def _check_kind(function: Callable[..., Any]) -> None:
    """Refuse early what a worker could only fail at.

    Raises:
        InvalidArgument: It is no plain function.
    """
    if isinstance(function, type):
        _check_class(function)
        function = function.__call__
    if not inspect.isfunction(function):
        raise InvalidArgument(
            f"{function!r} is no plain function: wrap what it does in `def name(…): …`"
        )
    what = {
        "a coroutine function": inspect.iscoroutinefunction(function),
        "a generator": inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function),
    }
    for kind, is_it in what.items():
        if is_it:
            raise InvalidArgument(
                f"{function.__qualname__} is {kind}, and its result cannot travel: "
                "use a plain function that returns a value"
            )


def _check_class(code: type) -> None:
    """Refuse early a class of which a worker could not make an object that can be called.

    Raises:
        InvalidArgument: It has no `__call__`, or its constructor wants something.
    """
    name = code.__qualname__
    if not inspect.isfunction(getattr(code, "__call__", None)):  # noqa: B004 - not callable(): a class always is
        raise InvalidArgument(
            f"{name} has no `def __call__(self, …)`: that is what runs for each call"
        )
    wanted = [
        parameter.name
        for parameter in inspect.signature(code).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if wanted:
        raise InvalidArgument(
            f"{name}() wants {', '.join(wanted)}: instances are made without arguments; load what "
            "is needed in enter()"
        )


def _entered(code: Callable[..., Any]) -> Callable[..., Any]:
    """Return an object of a class, ready for calls in this process."""
    made: Callable[..., Any] = code()
    if hasattr(made, "enter"):
        made.enter()
    if hasattr(made, "exit"):
        atexit.register(made.exit)
    return made

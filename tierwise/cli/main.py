"""Run functions and federated learning across edge, fog and cloud.

Data goes to standard output, messages to standard error.

Exit codes: 0 done, 1 the call or command failed, 2 wrong usage or invalid input, 3 not found,
4 the cluster cannot be reached, 5 not allowed, 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tierwise.cli import (
    admin,
    bill,
    doctor,
    explain,
    fl,
    get,
    memory,
    policy,
    system,
    top,
    up,
    work,
)
from tierwise.cli.completion import print_completion
from tierwise.cli.output import complain
from tierwise.errors import (
    CallerError,
    NotFound,
    PermissionDenied,
    TierwiseError,
    Unauthenticated,
    Unavailable,
)

DEBUG_VARIABLE = "TIERWISE_DEBUG"

app = typer.Typer(
    name="tierwise",
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verbs in (up, system, work, get, bill, explain, memory, top, admin, doctor):
    verbs.add_to(app)
app.add_typer(policy.app, name="policy")
app.add_typer(fl.app, name="fl")
app.command(name="completion")(print_completion)


@app.callback()
def settings(
    context: Annotated[
        Path | None,
        typer.Option(help="folder that says how to reach the cluster", envvar="TIERWISE_CONTEXT"),
    ] = None,
) -> None:
    """Run functions and federated learning across edge, fog and cloud."""
    if context is not None:
        os.environ["TIERWISE_CONTEXT"] = str(context)


settings.__doc__ = __doc__


def exit_code(error: TierwiseError) -> int:
    """Return the exit code of an error; the table is in this module's docstring."""
    match error:
        case NotFound():
            return 3
        case Unavailable():
            return 4
        case PermissionDenied() | Unauthenticated():
            return 5
        case CallerError():
            return 2
        case _:
            return 1


def run() -> None:
    """Run the command line; errors end as one clear message and an exit code."""
    try:
        app(prog_name="tierwise")
    except TierwiseError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        complain(str(error))
        sys.exit(exit_code(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # head and less may leave early
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # a bug: say so in one line, the traceback on demand
        if os.environ.get(DEBUG_VARIABLE):
            raise
        kind = type(error).__name__
        complain(f"internal error, {kind}: {error}\n{DEBUG_VARIABLE}=1 shows the traceback")
        sys.exit(1)

"""The life of a placement policy: train, evaluate, publish, promote, roll back."""

from pathlib import Path
from typing import Annotated

import typer

from tierwise.cli.common import become, operator
from tierwise.cli.output import say
from tierwise.errors import FailedPrecondition, NotFound

app = typer.Typer(help=__doc__, no_args_is_help=True)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def train(context: typer.Context) -> None:
    """Train a policy in the simulator; --help lists the options."""
    _train("training.ppo", context.args)


@app.command(name="eval", context_settings=_PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Compare policies in the simulator on held-out seeds; --help lists the options."""
    _train("training.evaluate", context.args)


@app.command(context_settings=_PASS_ON)
def tune(context: typer.Context) -> None:
    """Tune the weights of the base score on validation traces; --help lists the options."""
    _train("training.tune", context.args)


@app.command(context_settings=_PASS_ON)
def scenario(context: typer.Context) -> None:
    """Write a preset's world as a scenario's files, for `eval --scenario`; --help lists options."""
    _train("envs.scenario", context.args)


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="folder for the scenario and its records")],
    limit: Annotated[int, typer.Option(help="at most this many of the newest calls", min=1)] = 5000,
) -> None:
    """Make a scenario of the calls that this cluster has seen, for `eval --scenario`."""
    import json

    records = out / "records"
    records.mkdir(parents=True, exist_ok=True)
    with operator() as ask:
        found = {
            "calls": ask.calls(limit=limit),
            "nodes": ask.nodes(),
            "functions": ask.functions(),
            "links": ask.links(),
        }
    arguments = []
    for kind, rows in found.items():
        (records / f"{kind}.json").write_text(json.dumps(rows))
        arguments += [f"--{kind}", str(records / f"{kind}.json")]
    _train("training.dataset", [*arguments, "--out", str(out)])


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="run folder with policy.npz and policy.json")],
) -> None:
    """Store a trained policy in the cluster; prints its id. Nothing uses it until promoted."""
    try:
        weights = (folder / "policy.npz").read_bytes()
        card = (folder / "policy.json").read_bytes()
    except OSError as error:
        raise NotFound(f"{error.filename}: {error.strerror}; a run folder has both files") from None
    with operator() as ask:
        print(ask.publish(weights, card)["policy_id"])


@app.command()
def promote(
    policy: Annotated[str, typer.Argument(help="id, as `tierwise get policies` lists it")],
) -> None:
    """Make every agent use this policy."""
    with operator() as ask:
        ask.promote(policy)
    say(f"{policy} decides from now on; `tierwise policy rollback` returns to the one before")


@app.command()
def rollback() -> None:
    """Return to the policy that was in use before."""
    with operator() as ask:
        say(f"{ask.roll_back()['policy_id']} decides again")


def _train(module: str, arguments: list[str]) -> None:
    """Replace this process by the trainer, which needs the `train` extra."""
    from importlib.util import find_spec

    if find_spec("gymnasium") is None or find_spec("torch") is None:
        raise FailedPrecondition("training needs more packages: pip install 'tierwise[train]'")
    become(module, arguments)

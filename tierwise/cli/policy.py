"""The life of a placement policy: train, evaluate, publish, try, promote, roll back."""

from pathlib import Path
from typing import Annotated

import typer

from tierwise.cli.common import become, operator
from tierwise.cli.estimate import estimate
from tierwise.cli.output import say
from tierwise.config import parse_duration_s
from tierwise.errors import FailedPrecondition, InvalidArgument, NotFound

app = typer.Typer(help=__doc__, no_args_is_help=True)
app.command()(estimate)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def train(context: typer.Context) -> None:
    """Train a policy in the simulator, decision by decision; --help lists the options."""
    _train("training.ppo", context.args)


@app.command(name="eval", context_settings=_PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Compare policies in the simulator on held-out seeds; --help lists the options.

    With `--suite standard`: every policy on every preset, a load curve, shifted worlds, bounds.
    """
    is_suite = any(argument.partition("=")[0] == "--suite" for argument in context.args)
    _train("training.suite" if is_suite else "training.evaluate", context.args)


@app.command(context_settings=_PASS_ON)
def tune(context: typer.Context) -> None:
    """Tune the weights of the base score on validation traces; --help lists the options."""
    _train("training.tune", context.args)


@app.command(context_settings=_PASS_ON)
def search(context: typer.Context) -> None:
    """Search what a placement should pay for, by whole simulated worlds; --help lists options.

    Its run folder can be published as it is, or trained on: `policy train --prices RUN`.
    """
    _train("training.search", context.args)


@app.command(context_settings=_PASS_ON)
def bounds(context: typer.Context) -> None:
    """Show how much better any policy could be (simulated); --help lists the options."""
    _train("training.bounds", context.args)


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
        hint = "a run folder has both files"
        if (folder / "model.zip").exists():
            hint = f"this run has not ended: go on with `tierwise policy train --resume {folder}`"
        raise NotFound(f"{error.filename}: {error.strerror}; {hint}") from None
    with operator() as ask:
        print(ask.publish(weights, card)["policy_id"])


@app.command()
def shadow(
    policy: Annotated[str, typer.Argument(help="id, as `tierwise get policies` lists it")] = "",
    off: Annotated[bool, typer.Option("--off", help="end it")] = False,
) -> None:
    """Ask a policy beside the one that decides, and record what it would have done.

    `tierwise describe policy POLICY` shows how often it agrees and what the cost model expects it
    to gain. The cost model knows neither queues to come nor what other nodes decide: a canary does.
    """
    _one_of(policy, off)
    with operator() as ask:
        ask.shadow(policy)
    say(f"{policy} is in the shadow: its answers are recorded" if policy else "no shadow any more")


@app.command()
def canary(
    policy: Annotated[str, typer.Argument(help="id, as `tierwise get policies` lists it")] = "",
    share: Annotated[float, typer.Option(help="of all blocks, 0.05 to 0.95")] = 0.2,
    block: Annotated[str, typer.Option(help="length of a block: 30s, 5m")] = "30s",
    off: Annotated[bool, typer.Option("--off", help="end it")] = False,
) -> None:
    """Let a policy decide in a share of all time blocks, at once on all nodes.

    `tierwise describe policy POLICY` compares it with the policy in use, block by block. A block
    should be several times as long as queues last. `promote` or `rollback` end it.
    """
    _one_of(policy, off)
    with operator() as ask:
        ask.canary(policy, share, parse_duration_s(block))
    if policy:
        say(f"{policy} decides in {share:.0%} of all blocks of {block}")
    else:
        say("no canary any more")


def _one_of(policy: str, off: bool) -> None:
    if bool(policy) == off:
        raise InvalidArgument("name a policy to try, or end the trial with --off")


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
    """End a canary; without one, return to the policy that was in use before."""
    with operator() as ask:
        done = ask.roll_back()
    policy = done["policy"]["policy_id"]
    if done["ended_canary"]:
        say(f"the canary of {done['ended_canary']} has ended: {policy} decides alone")
        say("run it again to return to the policy before that")
    else:
        say(f"{policy} decides again")


def _train(module: str, arguments: list[str]) -> None:
    """Replace this process by the trainer, which needs the `train` extra."""
    from importlib.util import find_spec

    if find_spec("gymnasium") is None or find_spec("torch") is None:
        raise FailedPrecondition("training needs more packages: pip install 'tierwise[train]'")
    become(module, arguments)

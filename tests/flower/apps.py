"""ClientApps and a ServerApp that tests ship to workers, new style and old."""

import os
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.server import LegacyContext, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

app = ClientApp()


@app.query()
def echo(message: Message, context: Context) -> Message:
    """Return what came, word for word."""
    return Message(message.content, reply_to=message)


@app.query("count")
def count(message: Message, context: Context) -> Message:
    """Count this client's messages in the state of its context."""
    before = context.state.get("seen")
    number = 1 if before is None else int(before["count"]) + 1
    context.state["seen"] = MetricRecord({"count": number})
    context.state["last"] = ArrayRecord({"ones": Array(np.full(number, 1.0))})
    found = {"count": number, "partition": context.node_config["partition-id"]}
    return Message(RecordDict({"found": MetricRecord(found)}), reply_to=message)


@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    """Fail on odd partitions; end the process on the last."""
    partition = int(context.node_config["partition-id"])
    if partition == context.node_config["num-partitions"] - 1:
        os._exit(3)
    if partition % 2:
        raise ZeroDivisionError("an odd partition")
    return Message(RecordDict(), reply_to=message)


@app.query("wait")
def wait(message: Message, context: Context) -> Message:
    """Take as long as the message says."""
    seconds = message.content["config"]["seconds"]
    time.sleep(seconds[int(context.node_config["partition-id"])])
    return Message(RecordDict(), reply_to=message)


@app.query("where")
def where(message: Message, context: Context) -> Message:
    """Tell what a ClientApp sees of its surroundings."""
    import flwr
    import flwr.clientapp
    import flwr.serverapp

    config = ConfigRecord({"home": os.environ.get("HOME", ""), "flwr": flwr.__file__})
    config["version"] = flwr.__version__
    return Message(RecordDict({"config": config}), reply_to=message)


class OldClient(NumPyClient):
    """A client as they were written before messages: adds its number to every parameter."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get_parameters(self, config: dict) -> list:
        return [np.zeros(3)]

    def fit(self, parameters: list, config: dict) -> tuple:
        return [parameter + self.number for parameter in parameters], 1 + self.number, {}

    def evaluate(self, parameters: list, config: dict) -> tuple:
        return float(parameters[0].sum()), 1, {"number": self.number}


def client_fn(context: Context):
    return OldClient(int(context.node_config["partition-id"])).to_client()


old_client_app = ClientApp(client_fn)
histories = []


class Remembered(FedAvg):
    """FedAvg that leaves what it aggregates for the test."""

    def aggregate_fit(self, *args, **kwargs):
        found = super().aggregate_fit(*args, **kwargs)
        histories.append(found[0])
        return found


def prepare(strategy):
    """Stand for what a test does to the strategy."""
    return strategy


def server_fn(context: Context) -> ServerAppComponents:
    strategy = Remembered(min_fit_clients=4, min_evaluate_clients=4, min_available_clients=4)
    return ServerAppComponents(strategy=prepare(strategy), config=ServerConfig(num_rounds=2))


old_server_app = ServerApp(server_fn=server_fn)
masked_client_app = ClientApp(client_fn, mods=[secaggplus_mod])
masked_server_app = ServerApp()


@masked_server_app.main()
def masked_main(grid: Grid, context: Context) -> None:
    """Aggregate masked updates: four phases, between which clients keep keys in their state."""
    strategy = Remembered(min_fit_clients=4, min_available_clients=4, fraction_evaluate=0.0)
    legacy = LegacyContext(context, config=ServerConfig(num_rounds=1), strategy=strategy)
    masked = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2, max_weight=10.0)
    DefaultWorkflow(fit_workflow=masked)(grid, legacy)

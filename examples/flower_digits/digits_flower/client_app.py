"""A Flower ClientApp: trains and evaluates on the partition that its node has."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_flower import task

app = ClientApp()


def _share(context: Context):
    """Return the pictures and labels of this client."""
    config = context.run_config
    rows = task.partitions(
        int(context.node_config["num-partitions"]), float(config["alpha"]), int(config["seed"])
    )[int(context.node_config["partition-id"])]
    pictures, labels, *_ = task.split()
    return pictures[rows], labels[rows]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on local data."""
    pictures, labels = _share(context)
    config = context.run_config
    round_ = int(message.content["config"]["server-round"])
    arrays, loss = task.train(
        [message.content["arrays"][name].numpy() for name in task.NAMES],
        pictures,
        labels,
        int(config["local-epochs"]),
        int(config["batch-size"]),
        float(config["learning-rate"]),
        seed=[int(config["seed"]), round_, int(context.node_config["partition-id"])],
    )
    record = ArrayRecord({name: Array(a) for name, a in zip(task.NAMES, arrays, strict=True)})
    metrics = MetricRecord({"num-examples": len(labels), "train-loss": loss})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge the global model on local data."""
    pictures, labels = _share(context)
    arrays = [message.content["arrays"][name].numpy() for name in task.NAMES]
    accuracy, loss = task.judge(arrays, pictures, labels)
    metrics = MetricRecord({"num-examples": len(labels), "accuracy": accuracy, "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)

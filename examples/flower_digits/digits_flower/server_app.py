"""A Flower ServerApp: federated averaging with Flower's own strategy."""

from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_flower import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for some rounds; the results are left in the context's state."""
    config = context.run_config
    initial = task.initial(int(config["seed"]))
    *_, pictures, labels = task.split()

    def judge(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        accuracy, loss = task.judge([arrays[n].numpy() for n in task.NAMES], pictures, labels)
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    result = FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord(
            {name: Array(array) for name, array in zip(task.NAMES, initial, strict=True)}
        ),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=judge,
    )
    context.state["arrays"] = result.arrays
    judged = result.evaluate_metrics_serverapp
    context.state["judged"] = MetricRecord(
        {"accuracy": [float(judged[r]["accuracy"]) for r in sorted(judged)]}
    )

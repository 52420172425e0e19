"""A server that times its rounds: from the first message to the last reply."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; write how many seconds each took."""
    config = context.run_config
    arrays = ArrayRecord({"w": Array(np.zeros(int(config["parameters"]), np.float32))})
    nodes: list[int] = []
    while len(nodes) < int(config["clients"]):
        nodes = list(grid.get_node_ids())
        time.sleep(0.2)
    seconds = []
    for number in range(int(config["rounds"])):
        settings = ConfigRecord({"server-round": number + 1})
        content = RecordDict({"arrays": arrays, "config": settings})
        messages = [Message(content, node, "train") for node in nodes]
        start = time.perf_counter()
        replies = list(grid.send_and_receive(messages))
        seconds.append(time.perf_counter() - start)
        good = sum(reply.has_content() for reply in replies)
        if good != len(nodes):
            raise RuntimeError(f"round {number + 1}: {good} of {len(nodes)} clients answered")
    Path(str(config["out"])).write_text(json.dumps(seconds))

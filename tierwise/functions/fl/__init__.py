"""Analytics on rounds of federated learning. Pure NumPy."""

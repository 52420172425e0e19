"""The control plane. Never runs user code and never stands in the way of an interactive call."""

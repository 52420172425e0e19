"""Federated learning: what is known of a round, and what can be made of it."""

"""Rounds in which clients do nothing."""

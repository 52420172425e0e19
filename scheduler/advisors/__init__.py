"""Advice that refines a function's declaration before its calls are placed. Pure."""

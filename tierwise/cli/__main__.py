"""`python -m tierwise.cli` is the `tierwise` command."""

from tierwise.cli.main import run

run()

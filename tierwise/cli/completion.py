"""Shell completion as a verb, for those who keep their dotfiles themselves."""

from typing import Annotated

import typer

from tierwise.errors import InvalidArgument

SHELLS = ("bash", "zsh", "fish", "powershell")


def print_completion(
    shell: Annotated[
        str, typer.Argument(help=", ".join(SHELLS), autocompletion=lambda: list(SHELLS))
    ] = "bash",
) -> None:
    """Print the completion script of a shell: eval "$(tierwise completion bash)"."""
    from typer._completion_shared import get_completion_script  # as --show-completion does

    if shell not in SHELLS:
        raise InvalidArgument(f"completion {shell!r}: choose one of {', '.join(SHELLS)}")
    script = get_completion_script(
        prog_name="tierwise", complete_var="_TIERWISE_COMPLETE", shell=shell
    )
    print(script)

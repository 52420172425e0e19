"""Root runs a Python program as a user without any right: `python as_nobody.py ARGUMENT…`.

The interpreter may live where only root can look: then the way to it is opened, in a mount
namespace of this process alone.
"""

import os
import sys
from pathlib import Path

from agent.runtime import kernel

NOBODY = 60_123  # nobody's number: files of the real nobody are not ours either


def open_the_way(*wanted: str) -> None:
    """Put an open folder over each closed one, with what is wanted of it inside."""
    closed = [
        parent
        for path in wanted
        for parent in Path(path).parents
        if not parent.stat().st_mode & 0o001
    ]
    for folder in sorted(set(closed)):
        inside = {path: os.open(path, os.O_PATH) for path in wanted if folder in Path(path).parents}
        kernel.mount("open", str(folder), "tmpfs", 0, "mode=755")
        for path, descriptor in inside.items():
            Path(path).mkdir(parents=True)
            kernel.bind(f"/proc/self/fd/{descriptor}", path)
            os.close(descriptor)


def main() -> None:
    kernel.unshare(kernel.CLONE_NEWNS, "mount namespace")
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    open_the_way(*sorted({sys.base_prefix, sys.prefix, str(Path(__file__).parents[2])}))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()

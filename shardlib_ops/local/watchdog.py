"""A small process that cleans a cluster away as soon as its owner ends, however it ends.

`PR_SET_PDEATHSIG` would not do: it follows the thread that started a server, not the process, it is lost when
the server changes its account, and it removes no folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from shardlib_ops.local import registry

__all__ = ["main", "spawn"]

_LOOK_S: Final = 0.2
_TRIES: Final = 5
_RUN: Final = "import sys; sys.path[:0] = [sys.argv[1]]; from shardlib_ops.local.watchdog import main; main(sys.argv)"


def spawn(entry: Path) -> subprocess.Popen[bytes]:
    """Start the watchdog of a registered cluster, as a child of the owner."""
    root = Path(__file__).resolve().parents[2]
    # Isolated and without site-packages: it needs neither, and is there in 30 ms.
    command = [sys.executable, "-I", "-S", "-c", _RUN, str(root), str(entry), str(os.getpid())]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, cwd="/", start_new_session=True)


def main(arguments: list[str]) -> None:
    """Wait until the owner has ended, or has taken its entry back; in the first case clean up."""
    entry, owner = Path(arguments[2]), int(arguments[3])
    while os.getppid() == owner:
        if not entry.exists():
            return
        time.sleep(_LOOK_S)
    for _ in range(_TRIES):
        if registry.clean(entry):
            return
        time.sleep(_LOOK_S)

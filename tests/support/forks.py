"""Forking a test process on purpose, as pre-forking servers do."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

from tests.support.eventually import eventually


def in_child(work: Callable[[], None], *, within_s: float = 20.0) -> Callable[[], None]:
    """Run `work` in a forked child; the function returned waits for it and fails if it failed or did not end."""
    with warnings.catch_warnings():
        # Newer Pythons warn of any fork with threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001 - a child must not go on as a second pytest
            os.write(2, f"child {os.getpid()}: {error!r}\n".encode())
        finally:
            os._exit(code)

    def wait() -> None:
        ended: list[int] = []

        def gone() -> bool:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                ended.append(os.waitstatus_to_exitcode(status))
            return bool(pid)

        try:
            eventually(gone, within_s, f"child {child} ends")
        except AssertionError:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise
        assert ended == [0], f"child {child} ended with {ended[0]}; its error is on stderr"

    return wait

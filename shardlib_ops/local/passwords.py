"""Each server's password in a file of its own, so that a DSN can refer to it instead of holding it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final
from urllib.parse import quote

from shardlib_ops.local.ports import HOST
from shardlib_ops.local.postgres import DATABASE, ServerSpec
from shardlib_ops.local.template import SUPERUSER

__all__ = ["reference", "write_passwords"]

_FOLDER: Final = ".passwords"
"""No server can be called that."""


def _file(directory: Path, name: str) -> Path:
    return directory / _FOLDER / name


def write_passwords(directory: Path, specs: tuple[ServerSpec, ...]) -> None:
    """Write the passwords of these servers into the cluster's folder, readable by its owner alone."""
    (directory / _FOLDER).mkdir(mode=0o700, exist_ok=True)
    for spec in specs:
        path = _file(directory, spec.name)
        unfinished = path.with_name(f"{path.name}.new")
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"{spec.password}\n")
        unfinished.replace(path)


def reference(directory: Path, spec: ServerSpec) -> str:
    """The DSN of a server's superuser that names the file of the password: fit to be shown, and for the catalog."""
    file = quote(str(_file(directory, spec.name)), safe="/")
    return f"postgresql://{SUPERUSER}@{HOST}:{spec.port}/{DATABASE}?password=file:{file}"

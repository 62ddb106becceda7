"""Settings from a TOML file, the environment and flags, later ones before earlier; and how they are shown."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from shardlib.dsn import secrets_of
from shardlib.errors import InvalidArgument
from shardlib_ops.settings.model import Settings

__all__ = ["load_settings", "print_settings"]

PREFIX: Final = "SHARDLIB_"

# Two underscores between section and option: a Kubernetes service `shardlib-manager` sets SHARDLIB_MANAGER_PORT.
NESTED: Final = "__"

SHORT: Final[Mapping[str, tuple[str, ...]]] = {
    "SHARDLIB_CATALOG": ("catalog",),
    "SHARDLIB_JWT_SECRET": ("auth", "secret"),
    "SHARDLIB_JWT_KEY_FILE": ("auth", "key_file"),
    "SHARDLIB_JWKS_URL": ("auth", "jwks_url"),
    "SHARDLIB_AUDIT": ("audit", "url"),
}

_SHOWN_NEVER: Final = (("auth", "secret"), ("auth", "previous_secret"), ("catalog",), ("audit", "url"))


def load_settings(
    config: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings, each option from the last place that gives it: file, environment, flags.

    A variable is named `SHARDLIB_SECTION__OPTION`, such as `SHARDLIB_MANAGER__PORT`; lists are separated by commas.

    Args:
        config: a TOML file; left out: the one that `SHARDLIB_CONFIG` names, if it names one.
        flags: nested like the file. An option that is None was not given.
        environ: the environment; that of the process if left out.

    Raises:
        InvalidArgument: an option that there is not, or with a wrong value; a file that cannot be read. `name` is the
            option, such as `manager.port`.
    """
    environ = os.environ if environ is None else environ
    if config is None and environ.get("SHARDLIB_CONFIG"):
        config = Path(environ["SHARDLIB_CONFIG"])
    places = (_given(flags or {}), _from(environ), _read(config) if config is not None else {})

    class Loaded(Settings):
        """The settings, with the places that this call looks at."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(InitSettingsSource(settings_cls, dict(place)) for place in places)

    faults: list[Any] = []
    try:
        loaded = Loaded()
    except ValidationError as error:
        faults = list(error.errors(include_url=False, include_context=False))
    if faults:
        # Raised outside of the handler: pydantic's error holds the values, and would be the context of ours.
        raise _explained(faults[0])
    found = {name: getattr(loaded, name) for name in Settings.model_fields}
    if loaded.manager.tls is not None and "sslmodes" not in loaded.endpoints.model_fields_set:
        # Who encrypts the way to the manager means the way from it to the shards too.
        found["endpoints"] = loaded.endpoints.model_copy(update={"sslmodes": ("verify-full",)})
    return Settings(**found)


def print_settings(settings: Settings) -> str:
    """The settings as a TOML document, every secret in it replaced by `***`."""
    lines: list[str] = []
    tables: list[tuple[str, BaseModel]] = []
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            tables.append((name, value))
        else:
            lines.append(_line(name, value))
    while tables:
        table, model = tables.pop(0)
        lines += ["", f"[{table}]"]
        for name in type(model).model_fields:
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                tables.insert(0, (f"{table}.{name}", value))
            else:
                lines.append(_line(name, value))
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    if value is None:
        return f"# {name} is not set"
    return f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case SecretStr():
            return '"***"'
        case tuple():
            return f"[{', '.join(_toml(each) for each in value)}]"
    text = str(value)
    for secret in secrets_of(text):
        text = text.replace(secret, "***")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in escaped) + '"'


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags without those that were left out."""
    found: dict[str, Any] = {}
    for name, value in flags.items():
        if isinstance(value, Mapping):
            if inner := _given(value):
                found[name] = inner
        elif value is not None:
            found[name] = value
    return found


def _read(config: Path) -> dict[str, Any]:
    problem = ""
    found: dict[str, Any] = {}
    try:
        found = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"the file cannot be read ({error.strerror or type(error).__name__})"
    except UnicodeDecodeError:
        problem = "the file is not UTF-8 text"
    except tomllib.TOMLDecodeError as error:
        problem = f"the file is not TOML ({error})"
    if problem:
        raise InvalidArgument("config", str(config), problem)
    return found


def _from(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the variables of the environment say, nested like the file."""
    found: dict[str, Any] = {}
    sections = {name: field for name, field in Settings.model_fields.items() if _model(field) is not None}
    for variable in sorted(environ):
        if variable in SHORT:
            path: tuple[str, ...] = SHORT[variable]
        else:
            first, nested, rest = variable.removeprefix(PREFIX).lower().partition(NESTED)
            if not variable.startswith(PREFIX) or not nested or first not in sections:
                continue  # another program's, or a test's
            path = (first, *rest.split(NESTED))
        place = found
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = environ[variable]
    return found


def _model(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _explained(fault: Mapping[str, Any]) -> InvalidArgument:
    # What is not a word tells which kind of a union did not fit.
    path = tuple(str(part) for part in fault["loc"] if str(part).isidentifier() or isinstance(part, int))
    name = ".".join(path) or "settings"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return InvalidArgument(name, "***", f"there is no such option{_known_beside(path)}")
    value = fault["input"]
    secret = path in _SHOWN_NEVER or not isinstance(value, str | int | float | bool)
    return InvalidArgument(name, "***" if secret else value, message)


def _known_beside(path: tuple[str, ...]) -> str:
    model: type[BaseModel] = Settings
    for name in path[:-1]:
        field = model.model_fields.get(name)
        inner = _model(field) if field is not None else None
        if inner is None:
            return ""
        model = inner
    return f"; there are {', '.join(_names(model))}"


def _names(model: type[BaseModel]) -> Iterator[str]:
    yield from model.model_fields

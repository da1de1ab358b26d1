"""Reading configurations: a YAML file, `key=value` overrides, and messages that name what is wrong."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from toast.training.run_config import RunConfig
from toast.training.shipped import find_config
from toast.training.yaml_text import dump_yaml, parse_yaml, read_yaml_file

#: `~`, `~/x` and `~user/x`; a name may begin otherwise with a tilde.
_HOME = re.compile(r"~(?:$|[\w.-]*/)")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a configuration.

    Args:
        path: A YAML file, or a run folder, whose `config.yaml` is read. `configs/…` also names the files that
            the package ships, wherever the program runs.
        overrides: `key=value` with dotted keys, such as `optimizer.learning_rate=1e-3`; values are YAML.

    Raises:
        ValueError: If the file is not there or no YAML, a key is unknown (with the nearest), or a value does
            not fit; all faults at once.
    """
    place = path / "config.yaml" if path.is_dir() else find_config(path)
    if not place.exists():
        raise ValueError(
            f"{place} does not exist; needs a YAML file, or a run folder with its config.yaml. "
            "`toast configs` lists the files that the package ships."
        )
    return make_config(read_yaml(place), [parse_override(text) for text in overrides], str(place))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds settings by name.

    Raises:
        ValueError: If it is no YAML, or something else than settings.
    """
    held = read_yaml_file(path)
    if not isinstance(held, dict):
        raise ValueError(  # noqa: TRY004 - a fault of the file
            f"{path}: needs settings by name (a YAML mapping); got {type(held).__name__}."
        )
    return held


def _expanded(value: Any, place: str) -> Any:
    """Fills environment variables, `$NAME` or `${NAME}`, and the home folder, `~/…`, into text.

    Raises:
        ValueError: If a variable is not set, or there is no such home folder.
    """
    if isinstance(value, dict):
        return {key: _expanded(held, f"{place}.{key}" if place else str(key)) for key, held in value.items()}
    if isinstance(value, list):
        return [_expanded(held, place) for held in value]
    if isinstance(value, str) and _HOME.match(value):
        filled = os.path.expanduser(value)  # noqa: PTH111 - Path would take a slash at the end away
        if filled == value:
            raise ValueError(f"{place}: there is no such home folder; got {value!r}.")
        return _expanded(filled, place)
    if not isinstance(value, str) or "$" not in value:
        return value
    filled = os.path.expandvars(value)
    if missing := _VARIABLE.search(filled):
        raise ValueError(
            f"{place}: the environment variable {missing[1]} is not set; got {value!r}. "
            f"Set it (export {missing[1]}=…), or give the value itself."
        )
    return filled


def parse_override(text: str) -> tuple[str, Any]:
    """Returns key and value of `key=value`.

    Raises:
        ValueError: If it is no such text.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"needs key=value, such as optimizer.learning_rate=1e-3; got {text!r}.")
    try:
        return key.strip(), parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"{key}: the value {error}; got {value!r}.") from error


def make_config(
    settings: Mapping[str, Any], overrides: Iterable[tuple[str, Any]] = (), where: str = "configuration"
) -> RunConfig:
    """Checks settings and returns them as a configuration.

    Args:
        settings: Settings by name.
        overrides: Dotted keys with values, set on top in this order.
        where: Named in messages.

    Raises:
        ValueError: As `load_config`.
    """
    merged: dict[str, Any] = _copied(settings)
    for key, value in overrides:
        _set(merged, key, value)
    try:
        merged = _expanded(merged, "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        faults = "\n".join(f"  {_fault(each)}" for each in error.errors())
        raise ValueError(f"{where}:\n{faults}") from None


def _copied(value: Any) -> Any:
    return {key: _copied(held) for key, held in value.items()} if isinstance(value, Mapping) else value


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        held = settings.get(section)
        if isinstance(held, str) and section == "method":
            held = {"name": held}
        settings[section] = held if isinstance(held, dict) else {}
        settings = settings[section]
    settings[last] = _copied(value)  # later keys may set something in it


def _fault(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        return f"{place}: there is no such setting{guess} Known here: {', '.join(known)}."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
        message = "needs text; put it in quotes"
    got = "" if error["type"] in ("value_error", "missing") else f"; got {error['input']!r}"
    return f"{place}: {message}{got}." if place else f"{message}{got}."


def _fields(place: tuple[Any, ...]) -> list[str]:
    section: Any = RunConfig
    for name in place:
        kinds = [section.model_fields[name].annotation] if name in section.model_fields else []
        inner = [kind for each in kinds for kind in (each, *getattr(each, "__args__", ()))]
        section = next((k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)), section)
    return list(section.model_fields)


def to_yaml(config: RunConfig) -> str:
    """Returns a configuration as YAML, defaults included; reading it gives the same configuration."""
    return dump_yaml(config.model_dump(mode="json"))

"""Reads decoded JSON into dataclasses and refuses whatever does not fit exactly, with words that say where and why."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

_SHOWN = 80  # Characters of a wrong value that a message repeats.


class WrongShape(ValueError):
    """The value is not what the type says; the message names the field."""


def read(hint: Any, value: Any, where: str = "the input") -> Any:
    """`value` as a `hint`: a dataclass, str, int, float, bool, an enum, list, dict with str keys, or a union of these.

    Raises WrongShape for unknown or missing fields and for any value of another type; nothing is converted but int to
    float.
    """
    if hint is Any or hint is object:
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return _read_dataclass(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (list, tuple) and isinstance(value, list):
        items = [read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(cast(list[Any], value))]
        return items if origin is list else tuple(items)
    if origin is dict and isinstance(value, dict):
        return {key: read(arguments[1], item, f"{where}.{key}") for key, item in cast(dict[str, Any], value).items()}
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, where)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _read_enum(hint, value, where)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (str, int, bool) and type(value) is hint:
        return value
    raise WrongShape(f"{where} must be {_name(hint)}, not {_shown(value)}")


def _read_dataclass(cls: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise WrongShape(f"{where} must be one JSON object with the fields of {cls.__name__}, not {_shown(value)}")
    given = cast(Mapping[str, Any], value)
    hints = _hints(cls)
    for name in given:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(hints)}"
            raise WrongShape(f"{where} has no field {str(name)[:_SHOWN]!r} ({advice})")
    missing = [
        field.name
        for field in fields(cls)
        if field.name not in given and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise WrongShape(f"{where} lacks {', '.join(repr(name) for name in missing)}")
    prefix = "" if where == "the input" else f"{where}."
    return cls(**{name: read(hints[name], item, f"{prefix}{name}") for name, item in given.items()})


def _read_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in options:
        try:
            return read(option, value, where)
        except WrongShape:
            continue
    raise WrongShape(f"{where} must be {' or '.join(_name(option) for option in options)}, not {_shown(value)}")


def _read_enum(hint: type[Enum], value: Any, where: str) -> Enum:
    try:
        return hint(value)
    except ValueError:
        allowed = ", ".join(repr(member.value) for member in hint)
        raise WrongShape(f"{where} must be one of {allowed}, not {_shown(value)}") from None


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def _name(hint: Any) -> str:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    return {list: "a list", dict: "an object"}.get(get_origin(hint), getattr(hint, "__name__", str(hint)))


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"

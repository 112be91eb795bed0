"""Requests against the typed parameters that stripe-python ships for its pinned API version (B12)."""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any, Literal, NotRequired, Required, Union, cast, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

from typing_extensions import is_typeddict

from crosslogic.dev.stripe_double.refusals import Refusal

# What the typed parameters of the library hold for its own use; none of it goes over the wire.
_OPTIONS = frozenset(
    {
        "api_key",
        "stripe_version",
        "stripe_account",
        "stripe_context",
        "max_network_retries",
        "idempotency_key",
        "content_type",
        "headers",
    }
)


def read_form(text: str) -> dict[str, Any]:
    """`a[b][0]=c` as nested dictionaries; lists are dictionaries with numbers for keys still."""
    tree: dict[str, Any] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        head, *rest = name.split("[")
        path = [head, *(part.removesuffix("]") for part in rest)]
        at = tree
        for part in path[:-1]:
            below = at.setdefault(part, {})
            if not isinstance(below, dict):
                raise _refuse(f"Invalid parameter: {name}", name)
            at = cast(dict[str, Any], below)
        last = path[-1] or str(len(at))
        at[last] = value
    return tree


def checked(params: Mapping[str, Any], schema: str) -> dict[str, Any]:
    """The parameters, converted to the types of `stripe.params.<schema>`. Raises Refusal as Stripe words it."""
    if not schema:
        for name in params:
            if name != "expand":
                raise _refuse(f"Received unknown parameter: {name}", name, "parameter_unknown")
        return {}
    return cast(dict[str, Any], _read(dict(params), _typed(schema), ""))


@cache
def _typed(schema: str) -> Any:
    module, _, name = schema.rpartition(".")
    return getattr(importlib.import_module(f"stripe.params.{module}".rstrip(".")), name)


@cache
def _fields(typed: Any) -> dict[str, Any]:
    # Names in the inherited options that the modules of the parameters do not import.
    names = {"StripeContext": object, "Mapping": Mapping}
    hints = get_type_hints(typed, localns=names, include_extras=True)
    return {name: hint for name, hint in hints.items() if name not in _OPTIONS}


def _read(value: Any, wanted: Any, where: str) -> Any:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (NotRequired, Required):
        return _read(value, arguments[0], where)
    if origin in (Union, types.UnionType):
        return _read_union(value, arguments, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise _refuse(f"Invalid {where}: must be one of {', '.join(map(str, arguments))}", where)
    if is_typeddict(wanted):
        return _read_object(value, wanted, where)
    if origin is list:
        return _read_list(value, arguments[0], where)
    if wanted in (str, int, bool, float, Decimal):
        return _read_scalar(value, wanted, where)
    if not isinstance(value, dict):
        raise _refuse(f"Invalid object: {where}", where, "parameter_invalid_object")
    inner = arguments[-1] if arguments else str
    content = cast(dict[str, Any], value)
    return {name: _read(item, inner, f"{where}[{name}]") for name, item in content.items()}


def _read_union(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    literals = [value for choice in choices if get_origin(choice) is Literal for value in get_args(choice)]
    if value in literals:
        return value
    others = [choice for choice in choices if get_origin(choice) is not Literal and choice is not type(None)]
    if any(literals):
        # `|str` keeps the library open for values of later versions; this version refuses them.
        others = [choice for choice in others if choice is not str]
    refusal = _refuse(f"Invalid {where}: must be one of {', '.join(map(str, literals))}", where)
    for choice in others:
        try:
            return _read(value, choice, where)
        except Refusal as error:
            refusal = error
    raise refusal


def _read_object(value: Any, typed: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refuse(f"Invalid object: {where}", where, "parameter_invalid_object")
    given, fields = cast(dict[str, Any], value), _fields(typed)
    for name in given:
        if name not in fields:
            shown = _below(where, name)
            raise _refuse(f"Received unknown parameter: {shown}", shown, "parameter_unknown")
    for name in sorted(typed.__required_keys__ - given.keys()):
        shown = _below(where, name)
        raise _refuse(f"Missing required param: {shown}.", shown, "parameter_missing")
    return {name: _read(item, fields[name], _below(where, name)) for name, item in given.items()}


def _read_list(value: Any, inner: Any, where: str) -> list[Any]:
    if isinstance(value, dict):
        content = cast(dict[str, Any], value)
        if not all(name.isdigit() for name in content):
            raise _refuse(f"Invalid array: {where}", where, "parameter_invalid_array")
        value = [content[name] for name in sorted(content, key=int)]
    if not isinstance(value, list):
        raise _refuse(f"Invalid array: {where}", where, "parameter_invalid_array")
    return [_read(item, inner, f"{where}[{index}]") for index, item in enumerate(cast(list[Any], value))]


def _read_scalar(value: Any, wanted: type, where: str) -> Any:
    if isinstance(value, (dict, list)):
        raise _refuse(f"Invalid {_NAMES[wanted]}: {where}", where)
    if wanted is str:
        return str(value)
    if wanted is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise _refuse(f"Invalid boolean: {value}", where)
    try:
        return wanted(str(value))
    except (ValueError, InvalidOperation):
        raise _refuse(f"Invalid {_NAMES[wanted]}: {value}", where, f"parameter_invalid_{_NAMES[wanted]}") from None


_NAMES = {str: "string", int: "integer", bool: "boolean", float: "decimal", Decimal: "decimal"}


def _below(where: str, name: str) -> str:
    return f"{where}[{name}]" if where else name


def _refuse(message: str, param: str, code: str | None = None) -> Refusal:
    return Refusal(message, code=code, param=param, is_kept=False)

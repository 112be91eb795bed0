"""Writes docs/reference/settings.md from the settings themselves: `./test reference`."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from crosslogic.settings import Settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "settings.md"

_HEAD = """\
# Settings

Every process reads the same settings from its environment, as `CROSSLOGIC_<NAME>`. Times are in seconds. This page is
generated: `./test reference` writes it from `crosslogic/settings.py`.

Outside dev mode a process does not start without `CROSSLOGIC_ADMIN_TOKEN` and `CROSSLOGIC_NODE_SECRET`.

| variable | type | default | what it is |
|---|---|---|---|
"""


def settings_page() -> str:
    """The whole page."""
    return _HEAD + "".join(_row(name, field) for name, field in Settings.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `CROSSLOGIC_{name.upper()}` | {_type(field)} | {_default(field.default)} | {meaning} |\n"


def _type(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    name = {SecretStr: "secret", Path: "path", str: "text", bool: "`true` or `false`", int: "integer", float: "number"}[
        annotation
    ]
    bounds: list[str] = []
    for constraint in field.metadata:
        if isinstance(constraint, annotated_types.Ge):
            bounds.append(f"≥ {constraint.ge}")
        elif isinstance(constraint, annotated_types.Gt):
            bounds.append(f"> {constraint.gt}")
        elif isinstance(constraint, annotated_types.Le):
            bounds.append(f"≤ {constraint.le}")
        elif isinstance(constraint, annotated_types.MaxLen):
            bounds.append(f"at most {constraint.max_length} characters")
    return ", ".join([name, *bounds])


def _default(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value}`" if str(value) else "empty"


if __name__ == "__main__":
    PAGE.write_text(settings_page())

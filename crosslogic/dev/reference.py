"""Writes the pages of docs/reference that the code knows best, settings and metrics: `./test reference`."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from api.inference.observing import Observer
from crosslogic.settings import Settings

_FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"
PAGE = _FOLDER / "settings.md"
METRICS_PAGE = _FOLDER / "metrics.md"

_HEAD = """\
# Settings

Every process reads the same settings from its environment, as `CROSSLOGIC_<NAME>`. Times are in seconds. This page is
generated: `./test reference` writes it from `crosslogic/settings.py`.

Outside dev mode a process does not start without `CROSSLOGIC_ADMIN_TOKEN` and `CROSSLOGIC_NODE_SECRET`.

| variable | type | default | what it is |
|---|---|---|---|
"""


_METRICS_HEAD = """\
# Metrics

What `GET /metrics` of an API process shows; how to scrape it is in [observability](../observability.md). This page is
generated: `./test reference` writes it from `api/inference/observing.py`. A level that nobody knows yet is not shown.
Beside these are `process_…`: CPU, memory, open files and start of the process.

| metric | type | labels | what it is |
|---|---|---|---|
"""


def metrics_page() -> str:
    """The whole page of metrics."""
    rows = (
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels) or '–'} "
        f"| {metric.meaning} |\n"
        for metric in Observer().metrics
    )
    return _METRICS_HEAD + "".join(rows)


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
    METRICS_PAGE.write_text(metrics_page())

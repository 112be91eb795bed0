"""Shapes that every part of the admin API shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

from fastapi import Query
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from crosslogic.domain.ids import Kind

Item = TypeVar("Item")
Row = TypeVar("Row")


class Body(BaseModel):
    """What is sent to us. A field we do not know is refused: a typo must not pass for a default."""

    model_config = ConfigDict(extra="forbid")


class Page(BaseModel, Generic[Item]):
    """One page of a list."""

    model_config = ConfigDict(json_schema_extra={"description": "One page of a list."})

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = Field(description="There are more; ask again with `after` set to `next_after`.")
    next_after: str | None = Field(default=None, description="Cursor of the next page; null at the end.")


def page(rows: Sequence[Row], limit: int, show: Callable[[Row], Item], cursor: Callable[[Item], str]) -> Page[Any]:
    """The first `limit` of rows that were read with a limit of `limit + 1`."""
    data = [show(row) for row in rows[:limit]]
    has_more = len(rows) > limit
    return Page(data=data, has_more=has_more, next_after=cursor(data[-1]) if has_more else None)


class ErrorObject(BaseModel):
    """What is wrong, in OpenAI's words."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="The field or parameter at fault.")
    code: str | None = Field(examples=["invalid_id"])


class ErrorOut(BaseModel):
    """The body of every refusal and failure."""

    error: ErrorObject


Limit = Annotated[int, Query(ge=1, le=200, description="Most items of one page.")]
After = Annotated[str | None, Query(max_length=64, description="`next_after` of the page before.")]

# Printable and of one line: it is shown in tables and logged.
Label = Annotated[str, Field(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]


def _in_range(at: datetime) -> datetime:
    if not 2000 <= at.year <= 9000:
        raise ValueError("give a year from 2000 to 9000")
    return at


# Postgres and our arithmetic on instants stay clear of the calendar's ends.
Instant = Annotated[AwareDatetime, AfterValidator(_in_range)]


def after_uuid(kind: Kind, after: str | None) -> UUID | None:
    """The UUID of a cursor. Raises Rejected for one that is not ours."""
    return None if after is None else kind.parse(after)

"""The audit log: who changed what, and the proof that nobody changed that."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from api.admin.context import Admin, AdminRoute
from api.admin.schemas import Limit, Page, page
from crosslogic.store.audit import AuditEntry

router = APIRouter(route_class=AdminRoute)


class EntryOut(BaseModel):
    """One admin write."""

    seq: int
    at: datetime
    actor: str
    action: str = Field(examples=["key.create"])
    subject: str = Field(examples=["key_01k5…"])
    details: dict[str, Any]
    hash: str = Field(description="SHA-256 over the hash before it and this record, in hexadecimal.")


class VerdictOut(BaseModel):
    """What a walk over the whole log found."""

    is_intact: bool
    records: int = Field(description="How many records are right, from the first.")
    head: str = Field(description="Hash of the last of them. Kept elsewhere, it proves later that none was removed.")
    broken_seq: int | None = Field(description="The first record that is not right.")
    problem: str = Field(description="Empty for an intact log.")


@router.get("/audit")
async def list_entries(
    admin: Admin,
    subject: Annotated[str | None, Query(max_length=128, description="Only what was done to this id or name.")] = None,
    limit: Limit = 50,
    after: Annotated[int | None, Query(ge=1, le=2**62, description="`next_after` of the page before.")] = None,
) -> Page[EntryOut]:
    """The log, newest first."""
    subject = None if subject is None else subject.replace("\x00", "")
    rows = await admin.audit.list_entries(before_seq=after, subject=subject, limit=limit + 1)
    return page(rows, limit, _show_entry, lambda entry: str(entry.seq))


@router.get("/audit/verify")
async def verify(
    admin: Admin,
    head: Annotated[
        str | None, Query(pattern=r"^[0-9a-f]{64}$", description="A head printed earlier, which must be in the log.")
    ] = None,
) -> VerdictOut:
    """Walk the whole log and say whether every record is as it was written, and if not, which is the first."""
    verdict = await admin.audit.verify(None if head is None else bytes.fromhex(head))
    return VerdictOut(
        is_intact=not verdict.problem,
        records=verdict.records,
        head=verdict.head.hex(),
        broken_seq=verdict.broken_seq,
        problem=verdict.problem,
    )


def _show_entry(entry: AuditEntry) -> EntryOut:
    return EntryOut(
        seq=entry.seq,
        at=entry.at,
        actor=entry.actor,
        action=entry.action,
        subject=entry.subject,
        details=dict(entry.details),
        hash=entry.hash.hex(),
    )

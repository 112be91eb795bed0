"""One request: what it used, and why it went where it went."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from api.admin.context import Admin, AdminRoute
from crosslogic.domain import ids
from crosslogic.domain.errors import Rejected
from crosslogic.domain.scheduling import explained_decision

router = APIRouter(route_class=AdminRoute)

RequestPath = Annotated[
    str, Path(max_length=64, description="The id that `x-request-id` of the answer told.", examples=["req_01k5…"])
]


class WasteOut(BaseModel):
    """Tokens that a node read and made in vain."""

    node: str
    served_region: str
    reason: str
    prompt_tokens: int
    completion_tokens: int


class RequestOut(BaseModel):
    """A request's usage record, and the decisions behind it."""

    id: str = Field(examples=["req_01k5…"])
    admitted_at: datetime
    client_request_id: str = Field(description="What the client called it; empty if nothing.")
    org: str | None
    org_id: str
    environment: str | None
    environment_id: str
    key_id: str
    model: str
    endpoint_kind: str
    is_streamed: bool
    home_region: str
    served_region: str = Field(description="Empty: no node was reached.")
    node: str | None = Field(description="The node that answered or was tried last.")
    status: int = Field(description="What the client was answered.")
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    token_source: str
    latency_ms: int
    ttft_ms: int | None
    reservation_id: str | None = Field(description="The reservation that paid for it.")
    tries: int = Field(description="How many nodes were asked.")
    continuations: int = Field(description="How often another node went on with the answer.")
    waste: list[WasteOut] = Field(description="What nodes did for it that nobody pays for.")
    list_price_microdollars: int = Field(description="For display; bills are made of sums of tokens.")
    decision: dict[str, Any] | None = Field(
        description="Why this node: candidates, tries, the limits' standing. Null: none was kept, or over 7 days ago."
    )


@router.get("/requests/{request_id}")
async def get_request(request_id: RequestPath, admin: Admin) -> RequestOut:
    """What is known of one request."""
    uuid = ids.REQUEST.parse(request_id)
    found = await admin.requests.find(uuid)
    if found is None:
        raise Rejected(
            f"Nothing is known of {ids.REQUEST.show(uuid)}. Records arrive within seconds of a request's end; one that "
            "was refused at the door leaves none.",
            status=404,
            code="request_not_found",
        )
    node_id, decision = found.pop("node_id"), found.pop("decision")
    shown = {
        "id": ids.REQUEST.show(found["id"]),
        "org_id": ids.ORG.show(found["org_id"]),
        "environment_id": ids.ENVIRONMENT.show(found["environment_id"]),
        "key_id": ids.KEY.show(found["key_id"]),
        "node": None if node_id is None else ids.NODE.show(node_id),
        "reservation_id": None if found["reservation_id"] is None else ids.RESERVATION.show(found["reservation_id"]),
        "waste": [{**waste, "node": ids.NODE.show(waste.pop("node_id"))} for waste in found["waste"]],
        "decision": None if decision is None else explained_decision(decision),
    }
    return RequestOut.model_validate(found | shown)

"""A node's life: its states, the only ways between them, and where its engine may be reached."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from urllib.parse import urlsplit
from uuid import UUID

from crosslogic.domain.credentials import machine_mark
from crosslogic.domain.errors import InvariantViolated, Rejected
from crosslogic.domain.ids import NODE, ORG


class NodeState(StrEnum):
    """Only `ready` is routable. Each line says who leaves the state and how long it may last."""

    REQUESTED = "requested"  # NodeProvisioning leaves it at once: the intent is written, no cloud was called yet.
    LAUNCHING = "launching"  # NodeProvisioning leaves it when the cloud has a machine, or at the launch deadline.
    BOOTING = "booting"  # NodeProvisioning leaves it when the engine answers, or at the boot deadline.
    LOADING = "loading"  # NodeProvisioning leaves it when the engine has generated a token, or at the load deadline.
    READY = "ready"  # NodeLifecycle leaves it: on a drain, a death or a bad verdict. It may last for ever.
    DRAINING = "draining"  # NodeLifecycle leaves it when running requests have ended, or at the drain deadline.
    TERMINATED = "terminated"  # Final: we ended it and the cloud has confirmed.
    FAILED = "failed"  # Final: it never served, or broke; the cloud has confirmed that its machine is gone.
    LOST = "lost"  # Final: the cloud took it.


class NodeEvent(StrEnum):
    """What moves a node from state to state."""

    LAUNCH = "launch"
    BOOT = "boot"
    LOAD = "load"
    ADMIT = "admit"
    DRAIN = "drain"
    TERMINATE = "terminate"
    FAIL = "fail"
    LOSE = "lose"


_ENDS = {
    NodeEvent.TERMINATE: NodeState.TERMINATED,
    NodeEvent.FAIL: NodeState.FAILED,
    NodeEvent.LOSE: NodeState.LOST,
}

# A ready node ends only through draining, so that it has left the route table before anything of it is undone.
TRANSITIONS: dict[NodeState, dict[NodeEvent, NodeState]] = {
    NodeState.REQUESTED: {NodeEvent.LAUNCH: NodeState.LAUNCHING, **_ENDS},
    NodeState.LAUNCHING: {NodeEvent.BOOT: NodeState.BOOTING, **_ENDS},
    NodeState.BOOTING: {NodeEvent.LOAD: NodeState.LOADING, **_ENDS},
    NodeState.LOADING: {NodeEvent.ADMIT: NodeState.READY, **_ENDS},
    NodeState.READY: {NodeEvent.DRAIN: NodeState.DRAINING},
    NodeState.DRAINING: {**_ENDS},
    NodeState.TERMINATED: {},
    NodeState.FAILED: {},
    NodeState.LOST: {},
}

FINAL_STATES = frozenset(state for state, ways in TRANSITIONS.items() if not ways)
ON_THE_WAY = frozenset({NodeState.REQUESTED, NodeState.LAUNCHING, NodeState.BOOTING, NodeState.LOADING})


def advance(state: NodeState, event: NodeEvent) -> NodeState:
    """The state after `event`. Raises InvariantViolated where TRANSITIONS knows no way (F4)."""
    following = TRANSITIONS[state].get(event)
    if following is None:
        raise InvariantViolated(f"a {state} node cannot {event}")
    return following


def sources_of(event: NodeEvent) -> tuple[NodeState, ...]:
    """Every state that `event` may leave: the `WHERE state = ANY(…)` of its UPDATE."""
    return tuple(state for state, ways in TRANSITIONS.items() if event in ways)


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """What the API must know of a node: one row of the route table. Addresses never leave the process."""

    node_id: str
    generation: int
    state: NodeState
    model: str
    region: str
    endpoint: str
    deployment: str = ""
    capacity_tokens_per_s: int = 0
    is_tombstoned: bool = False
    price_microdollars_per_h: int = 0
    org: str = ""  # The id of the org that alone it serves; empty: everybody.
    has_agent: bool = False  # It is reached with certificates of ours, under its own name.
    revision: int = 1
    is_held: bool = False  # A roll-out has not verified it yet.

    @property
    def is_routable(self) -> bool:
        """May a request be started there? (F2, F6)"""
        return self.state is NodeState.READY and not self.is_tombstoned and not self.is_held

    def is_same_door(self, other: RouteEntry) -> bool:
        """Is the engine reached in the same way?"""
        return self.endpoint == other.endpoint and self.has_agent == other.has_agent


@dataclass(frozen=True, slots=True)
class Intent:
    """What a node is meant to be: all that is known of it before any cloud is called (F3)."""

    id: UUID
    model: str
    region: str
    provider: str
    cluster: str
    workflow_id: str
    deployment: str | None = None
    gpu: str = ""
    is_spot: bool = False
    is_pinned: bool = False
    drain_timeout_s: int = 120
    revision: int = 1
    is_held: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A row of the registry. `generation` grows with every change; `tombstoned_at` is never taken back (F4)."""

    id: UUID
    deployment: str | None
    model: str
    region: str
    provider: str
    cluster: str
    gpu: str
    is_spot: bool
    is_pinned: bool
    state: NodeState
    generation: int
    reason: str
    endpoint: str | None
    capacity_tokens_per_s: int
    workflow_id: str
    drain_timeout_s: int
    created_at: datetime
    changed_at: datetime
    ready_at: datetime | None
    tombstoned_at: datetime | None
    ended_at: datetime | None
    price_microdollars_per_h: int = 0
    org_id: UUID | None = None
    has_agent: bool = False
    cloud: str = ""
    cloud_region: str = ""
    zone: str = ""
    instance_type: str = ""
    revision: int = 1
    is_held: bool = False

    @property
    def node_id(self) -> str:
        """The id as it is shown: `node_01k…`."""
        return NODE.show(self.id)

    @property
    def is_tombstoned(self) -> bool:
        """It is being undone: nothing may launch or admit it any more."""
        return self.tombstoned_at is not None

    @property
    def route_entry(self) -> RouteEntry:
        """What the API must know of it."""
        return RouteEntry(
            node_id=self.node_id,
            generation=self.generation,
            state=self.state,
            model=self.model,
            region=self.region,
            endpoint=self.endpoint or "",
            deployment=self.deployment or "",
            capacity_tokens_per_s=self.capacity_tokens_per_s,
            is_tombstoned=self.is_tombstoned,
            price_microdollars_per_h=self.price_microdollars_per_h,
            org="" if self.org_id is None else ORG.show(self.org_id),
            has_agent=self.has_agent,
            revision=self.revision,
            is_held=self.is_held,
        )


def cluster_name(provider: str, region: str, gpu: str, is_spot: bool, node_id: str, node_secret: str = "") -> str:
    """The machine's name in its cloud: `cic-<provider>-<region>-<gpu>-<spot|od>-<short id>`.

    It derives from the node id alone, so that a repeated launch finds the first one's machine. The short id is the last
    ten characters (50 random bits), and with a `node_secret` the installation's mark behind them.
    """
    identity = node_id[-10:]
    mark = machine_mark(node_secret, identity) if node_secret else ""
    return f"cic-{provider}-{region}-{gpu.lower()}-{'spot' if is_spot else 'od'}-{identity}{mark}"


def check_endpoint(url: str, *, is_loopback_allowed: bool) -> str:
    """A node's base URL in canonical form, `scheme://host[:port]`. Raises Rejected for one we must not call.

    HTTPS everywhere; plain HTTP only to loopback, and loopback only in dev mode. Literal addresses that belong to no
    node (link-local, multicast, metadata services) are refused; names are checked again when they are resolved.
    """
    problem = None
    parts = urlsplit(url.strip())
    host = parts.hostname or ""
    try:
        port = parts.port
    except ValueError:
        port, problem = None, "its port is not a number from 1 to 65535"
    is_loopback = host == "localhost"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is not None:
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        is_loopback = address.is_loopback
        # Python counts ::1 among the reserved addresses.
        is_reserved = address.is_reserved and not is_loopback
        if address.is_link_local or address.is_multicast or address.is_unspecified or is_reserved:
            problem = "that address cannot be a node's"
    if parts.scheme not in ("http", "https") or not host:
        problem = "write https://HOST[:PORT]"
    elif parts.username or parts.password:
        problem = "leave the credentials out"
    elif parts.path not in ("", "/", "/v1", "/v1/") or parts.query or parts.fragment:
        problem = "give the base URL only, without a path"
    elif is_loopback and not is_loopback_allowed:
        problem = "loopback addresses are for dev mode"
    elif parts.scheme == "http" and not is_loopback:
        problem = "nodes are reached over https"
    if problem:
        raise Rejected(f"Cannot use the endpoint {url[:200]!r}: {problem}.", code="invalid_endpoint", param="endpoint")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}" + (f":{port}" if port else "")

"""Which network addresses may be a node's: what a name resolves to is checked whenever it is connected to (H7)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from crosslogic.domain.errors import Rejected

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Cloud metadata services that are not link-local: AWS over IPv6, Alibaba, Oracle and others use link-local or these.
_METADATA = frozenset(ipaddress.ip_address(text) for text in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192"))


def read_networks(text: str) -> tuple[Network, ...]:
    """Networks written as `10.0.0.0/8, fd12::/16`. Raises Rejected for what is none."""
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise Rejected(
            f"CROSSLOGIC_NODE_NETWORKS cannot be read ({error}); write networks such as 10.0.0.0/8,192.168.0.0/16."
        ) from error


def refusal(address: str, networks: Sequence[Network], *, is_loopback_allowed: bool) -> str | None:
    """Why no node can be at this address, None if one can.

    Public addresses are fine; private ones inside `networks` only; link-local, multicast, reserved and metadata
    addresses never. The text names no address.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "what it resolves to is no address"
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    if parsed.is_loopback:
        return None if is_loopback_allowed else "loopback addresses are for dev mode"
    if parsed.is_link_local or parsed.is_multicast or parsed.is_unspecified or parsed in _METADATA:
        return "that address cannot be a node's"
    if any(parsed in network for network in networks if network.version == parsed.version):
        return None
    if not parsed.is_global:
        return "private addresses must be listed in CROSSLOGIC_NODE_NETWORKS"
    return None

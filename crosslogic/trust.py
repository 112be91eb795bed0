"""How one of our processes and the nodes know each other: our authorities, and its own client certificate.

Joins the store that has the authorities with what issues certificates, for the API and the worker alike.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import ssl
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from crosslogic.clients import authority
from crosslogic.clients.authority import Certificate
from crosslogic.domain.certificates import (
    AUTHORITY_NOTICE,
    Authority,
    issuer,
    names_of,
    renew_at,
    server_name,
    trusted,
)
from crosslogic.domain.errors import InvariantViolated, Unavailable
from crosslogic.domain.ids import NODE
from crosslogic.store.agents import AgentStore, IssuedCertificate

log = logging.getLogger("crosslogic.trust")

# A successor is trusted for days before it issues, so this may be slow.
REFRESH_INTERVAL_S = 60.0
RETRY_INTERVAL_S = 2.0


class Trust:
    """This process's side of mutual TLS with nodes, kept fresh while it runs.

    `context` is the same object for ever: certificates are loaded into it as they come, for the connections that
    follow. Until the first `refresh` it trusts nobody.
    """

    def __init__(self, agents: AgentStore, secret: str, name: str, clock: Callable[[], datetime]) -> None:
        self._agents = agents
        self._secret = secret
        self._name = name
        self._now = clock
        self._known: Sequence[Authority] = ()
        self._loaded: set[int] = set()
        self._renew_at: datetime | None = None
        self._are_agents: set[UUID] = set()
        # Set once nodes can be reached: a connection before that would count as the node's failure.
        self.ready = asyncio.Event()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2

    async def refresh(self) -> None:
        """Read the authorities, making the first; renew this process's certificate when it is due."""
        known = await self._agents.list_authorities()
        if issuer(known, self._now()) is None:
            known = await self._agents.add_authority(self._first)
        self._take(known)

    async def rotate(self, *, is_forced: bool = False) -> list[Authority]:
        """Add a successor when the newest authority ages, or in any case; those that are trusted now."""

        def make(known: Sequence[Authority]) -> Authority | None:
            now = self._now()
            newest = trusted(known, now)[0] if trusted(known, now) else None
            if newest is None:
                return self._first(known)
            if newest.issues_from > now or not (is_forced or newest.is_ageing(now)):
                return None
            return self._successor(known, AUTHORITY_NOTICE)

        known = await self._agents.add_authority(make)
        self._take(known)
        return trusted(known, self._now())

    async def keep_fresh(self) -> None:
        """Run for the life of the process."""
        while True:
            try:
                await self.refresh()
            except Exception as error:
                log.warning("the authorities cannot be read now: %r", error)
                await asyncio.sleep(RETRY_INTERVAL_S)
            else:
                await asyncio.sleep(REFRESH_INTERVAL_S)

    async def bundle(self) -> str:
        """The certificates of all authorities that are trusted now, newest first, as PEM."""
        if not self._known:
            await self.refresh()
        return "".join(one.certificate for one in trusted(self._known, self._now()))

    async def bundle_id(self) -> str:
        """Tells two bundles apart."""
        return hashlib.sha256((await self.bundle()).encode()).hexdigest()[:16]

    async def issue(self, node_id: str, csr: str, endpoint: str) -> tuple[Certificate, IssuedCertificate]:
        """A node's certificate, and what is to be remembered of it. Raises Rejected for a request that is none."""
        request = authority.read_request(csr)
        await self.refresh()
        now = self._now()
        by = issuer(self._known, now)
        if by is None:
            raise InvariantViolated("there is no authority that issues")
        made = authority.issue_node(by, self._secret, request, names_of(node_id, endpoint), now)
        return made, IssuedCertificate(made.serial, by.id, made.issued_at, made.expires_at)

    async def tls_of(self, node_id: str) -> tuple[ssl.SSLContext, str] | None:
        """The context and server name for a node with an agent; None for one that has a public certificate.

        Raises Unavailable while Postgres, which knows, is away and this process does not know yet.
        """
        uuid = NODE.parse(node_id)
        if uuid not in self._are_agents:
            try:
                if not await self._agents.is_agent(uuid):
                    return None
            except Exception as error:
                raise Unavailable(f"It cannot be found out whether node {node_id} has an agent.") from error
            self._are_agents.add(uuid)
        return self.context, server_name(node_id)

    def _first(self, known: Sequence[Authority]) -> Authority | None:
        return self._successor(known, timedelta()) if issuer(known, self._now()) is None else None

    def _successor(self, known: Sequence[Authority], notice: timedelta) -> Authority:
        number = max((one.id for one in known), default=0) + 1
        now = self._now()
        return authority.make_authority(number, self._secret, now, now + notice)

    def _take(self, known: Sequence[Authority]) -> None:
        now = self._now()
        self._known = known
        for one in trusted(known, now):
            if one.id not in self._loaded:
                self.context.load_verify_locations(cadata=one.certificate)
                self._loaded.add(one.id)
        by = issuer(known, now)
        if by is not None and (self._renew_at is None or now >= self._renew_at):
            made = authority.issue_client(by, self._secret, self._name, now)
            _load(self.context, made.pem)
            self._renew_at = renew_at(made.issued_at, made.expires_at)
            self.ready.set()


def _load(context: ssl.SSLContext, pem: str) -> None:
    """Load a certificate and its key, which Python's ssl takes from a file only."""
    descriptor, path = tempfile.mkstemp(prefix="crosslogic-", suffix=".pem")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(pem)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)

"""Mutual TLS between our processes and nodes, over a real relay: who gets in, who is believed, and rotation."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from api.inference.upstream import Upstream
from crosslogic.agent.identity import Identity, make_context, make_key, make_request, pending_key
from crosslogic.agent.relay import Relay
from crosslogic.clients import authority
from crosslogic.domain.certificates import AUTHORITY_LIFE, server_name
from crosslogic.domain.errors import InvariantViolated, Rejected
from crosslogic.domain.ids import NODE
from crosslogic.new_ids import new_id
from crosslogic.settings import Settings
from crosslogic.store.agents import AgentStore, Invitation
from crosslogic.trust import Trust
from tests.conftest import make_settings
from tests.engines import Engine

SECRET = "a node secret for tests of trust"


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


async def make_trust(pool: asyncpg.Pool, clock: Clock | None = None, secret: str = SECRET) -> Trust:
    trust = Trust(AgentStore(pool), secret, "test.crosslogic.internal", clock or Clock())
    await trust.refresh()
    return trust


async def make_identity(trust: Trust, folder: Path, node_id: str) -> Identity:
    key = make_key(str(folder))
    made, _ = await trust.issue(node_id, make_request(key, node_id, str(folder)), "https://127.0.0.1:1")
    return Identity(node_id, key, made.pem, await trust.bundle(), await trust.bundle_id(), "", "nc_x", 0)


@contextlib.asynccontextmanager
async def relaying(identity: Identity, folder: Path, engine: Engine) -> AsyncGenerator[str]:
    """The endpoint of a node's door in front of an engine."""
    context = make_context()
    identity.load_into(context, str(folder))
    relay = Relay(context, int(engine.url.rpartition(":")[2]))
    port = await relay.listen("127.0.0.1", 0)
    try:
        yield f"https://127.0.0.1:{port}"
    finally:
        relay.close()


async def exchange(endpoint: str, context: ssl.SSLContext, node_id: str) -> int:
    """The status of one request through our own upstream client."""
    upstream = Upstream(endpoint, "nc_x", context, server_name(node_id))
    connection = await upstream.connect()
    try:
        connection.send(upstream.request(b"/v1/chat/completions", b'{"model":"m","messages":[]}', b""))
        at = asyncio.get_running_loop().time() + 5
        await connection.read_all(at, at, 100_000)
        return connection.status
    finally:
        upstream.release(connection)
        upstream.close()


@pytest.fixture
def node_id() -> str:
    return NODE.show(new_id())


class TestMutualTls:
    async def test_lets_us_in_and_nobody_else(self, pool: asyncpg.Pool, tmp_path: Path, node_id: str) -> None:
        trust = await make_trust(pool)
        identity = await make_identity(trust, tmp_path, node_id)
        async with Engine() as engine, relaying(identity, tmp_path, engine) as endpoint:
            assert await exchange(endpoint, trust.context, node_id) == 200

            nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            nobody.load_verify_locations(cadata=identity.bundle)
            with pytest.raises(Exception, match=r"CERTIFICATE_REQUIRED|certificate required|closed|reset"):
                await exchange(endpoint, nobody, node_id)
            # Another node's certificate is of our authority too, but it is a server's: it opens no door.
            neighbour = await make_identity(trust, tmp_path, NODE.show(new_id()))
            neighbour.load_into(nobody, str(tmp_path))
            with pytest.raises(Exception, match=r"certificate|CERTIFICATE|closed|reset"):
                await exchange(endpoint, nobody, node_id)
            assert len(engine.requests) == 1

    async def test_believes_no_node_under_another_nodes_name(
        self, pool: asyncpg.Pool, tmp_path: Path, node_id: str
    ) -> None:
        trust = await make_trust(pool)
        identity = await make_identity(trust, tmp_path, node_id)
        async with Engine() as engine, relaying(identity, tmp_path, engine) as endpoint:
            with pytest.raises(ssl.SSLCertVerificationError):
                await exchange(endpoint, trust.context, NODE.show(new_id()))
            assert engine.requests == []

    async def test_a_caller_that_hangs_up_ends_the_engines_work(
        self, pool: asyncpg.Pool, tmp_path: Path, node_id: str
    ) -> None:
        """H1, through the relay."""
        trust = await make_trust(pool)
        identity = await make_identity(trust, tmp_path, node_id)
        async with Engine(pace_s=0.05) as engine, relaying(identity, tmp_path, engine) as endpoint:
            upstream = Upstream(endpoint, "nc_x", trust.context, server_name(node_id))
            connection = await upstream.connect()
            connection.send(upstream.request(b"/v1/chat/completions", b'{"model":"m","stream":true}', b""))
            asked = await engine.request()
            upstream.release(connection)
            await asked.closed()
            upstream.close()


class TestRotation:
    async def test_every_process_has_the_same_first_authority(self, pool: asyncpg.Pool) -> None:
        trusts = await asyncio.gather(*(make_trust(pool) for _ in range(4)))
        assert len({await trust.bundle() for trust in trusts}) == 1
        assert len(await AgentStore(pool).list_authorities()) == 1

    async def test_nothing_breaks_while_a_successor_takes_over(
        self, pool: asyncpg.Pool, tmp_path: Path, node_id: str
    ) -> None:
        clock = Clock()
        # TLS itself goes by the machine's clock: what is issued last must be valid today.
        clock.now -= timedelta(days=3)
        trust = await make_trust(pool, clock)
        before = await make_identity(trust, tmp_path, node_id)
        await trust.rotate()
        assert len(await AgentStore(pool).list_authorities()) == 1, "nothing was due"
        await trust.rotate(is_forced=True)
        await trust.rotate(is_forced=True)
        first, second = await AgentStore(pool).list_authorities()
        assert second.issues_from > clock.now, "one that does not issue yet is enough"
        assert await trust.bundle() == second.certificate + first.certificate
        clock.now += timedelta(days=3)
        after = await make_identity(trust, tmp_path, node_id)
        assert after.bundle != before.bundle
        # A process that started before it, a node that has renewed: both authorities are believed on both sides.
        async with Engine() as engine, relaying(after, tmp_path, engine) as endpoint:
            assert await exchange(endpoint, trust.context, node_id) == 200

    async def test_is_due_with_a_third_of_the_life_left(self, pool: asyncpg.Pool) -> None:
        clock = Clock()
        trust = await make_trust(pool, clock)
        clock.now += AUTHORITY_LIFE * 0.7
        assert len(await trust.rotate()) == 2

    async def test_a_key_is_worth_nothing_under_another_secret(self, pool: asyncpg.Pool) -> None:
        await make_trust(pool)
        with pytest.raises(InvariantViolated, match="CROSSLOGIC_NODE_SECRET"):
            await make_trust(pool, secret="another secret")
        row = (await AgentStore(pool).list_authorities())[0]
        assert b"PRIVATE" not in row.sealed_key


class TestRequest:
    @pytest.mark.parametrize("pem", ["", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", "x" * 10_000])
    def test_that_is_none_is_refused(self, pem: str) -> None:
        with pytest.raises(Rejected, match="signing request"):
            authority.read_request(pem)

    def test_without_openssl_the_key_is_made_in_python(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        key = pending_key(str(tmp_path))
        assert pending_key(str(tmp_path)) == key, "a token belongs to the first key that used it"
        assert (tmp_path / "pending-key.pem").stat().st_mode & 0o077 == 0
        assert authority.read_request(make_request(key, "node_x", str(tmp_path)))


class TestJoinToken:
    async def test_is_good_for_one_key_once(self, pool: asyncpg.Pool) -> None:
        store, node = AgentStore(pool), new_id()
        until = datetime.now(UTC) + timedelta(hours=1)
        await store.invite("jt_a", Invitation(node, until, None, "llama-3-8b", "in-mumbai"), actor="test")
        used = await store.use_token("jt_a", node, b"k" * 32)
        assert (used.model, used.region, used.org_id) == ("llama-3-8b", "in-mumbai", None)
        assert await store.use_token("jt_a", node, b"k" * 32) == used, "its answer may have been lost"
        for token, whose, key, why in (
            ("jt_a", node, b"x" * 32, "used already"),
            ("jt_a", new_id(), b"k" * 32, "not this node's"),
            ("jt_b", node, b"k" * 32, "never given out"),
        ):
            with pytest.raises(Rejected, match=why):
                await store.use_token(token, whose, key)

    async def test_expires(self, pool: asyncpg.Pool) -> None:
        store, node = AgentStore(pool), new_id()
        past = datetime.now(UTC) - timedelta(seconds=1)
        await store.invite("jt_a", Invitation(node, past, None, "llama-3-8b", "in-mumbai"), actor="test")
        with pytest.raises(Rejected, match="expired"):
            await store.use_token("jt_a", node, b"k" * 32)
        assert "jt_a" not in str([dict(row) for row in await pool.fetch("SELECT * FROM join_tokens")])


class TestGuard:
    """H7: a name is resolved once for each connection, checked, and connected to as it was checked."""

    @pytest.fixture
    def settings(self) -> Settings:
        return make_settings(mode="production", admin_token="a" * 24, node_secret="n" * 32, node_networks="")

    async def test_a_name_that_resolves_to_this_machine_is_not_connected_to(self, settings: Settings) -> None:
        async with Engine() as engine:
            port = engine.url.rpartition(":")[2]
            upstream = Upstream(f"https://localhost:{port}", "nc_x", None, guard=settings.refuse_address)
            with pytest.raises(PermissionError, match="loopback"):
                await upstream.connect()
            assert Upstream(f"http://localhost:{port}", "nc_x", None, guard=make_settings().refuse_address)
            allowed = Upstream(f"http://127.0.0.1:{port}", "nc_x", None, guard=make_settings().refuse_address)
            allowed.release(await allowed.connect())
            allowed.close()

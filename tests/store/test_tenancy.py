from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from crosslogic.domain import ids, keys
from crosslogic.domain.errors import Rejected
from crosslogic.domain.tenancy import GLOBAL_SUBJECT, LAYERS, Environment, Key, LimitRow, Org
from crosslogic.new_ids import new_id
from crosslogic.store.audit import AuditStore
from crosslogic.store.tenancy import TenancyStore

ACTOR = "a test"


@dataclass
class House:
    """One org with one environment and one key, and the store that made them."""

    pool: asyncpg.Pool
    store: TenancyStore
    org: Org
    environment: Environment
    key: Key
    secret: str

    async def actions(self) -> list[tuple[str, str]]:
        """What the audit log says, oldest first; the chain must hold."""
        assert (await AuditStore(self.pool).verify()).problem == ""
        entries = await AuditStore(self.pool).list_entries(limit=200)
        return [(entry.action, entry.subject) for entry in reversed(entries)]

    async def last_details(self) -> Any:
        return (await AuditStore(self.pool).list_entries(limit=1))[0].details

    async def tenancy_counter(self) -> int:
        return await self.pool.fetchval("SELECT seq FROM change_counters WHERE noun = 'tenancy'")


@pytest_asyncio.fixture
async def house(pool: asyncpg.Pool) -> House:
    store = TenancyStore(pool)
    org, _ = await store.create_org(new_id(), "acme", region_preferences=("in-mumbai", "us-east"), actor=ACTOR)
    environment, _ = await store.create_environment(new_id(), org.id, "prod", actor=ACTOR)
    key, secret = await make_key(store, environment)
    return House(pool, store, org, environment, key, secret)


async def make_key(store: TenancyStore, environment: Environment, **more: Any) -> tuple[Key, str]:
    secret = keys.mint(environment.name, new_id().bytes + bytes(8))
    key, is_new = await store.create_key(
        new_id(),
        environment.id,
        secret_hash=keys.hash_secret(secret),
        hint=keys.hint_of(secret),
        actor=ACTOR,
        **more,
    )
    assert is_new
    return key, secret


class TestFindPrincipals:
    async def test_finds_those_that_are_there(self, house: House) -> None:
        digest = keys.hash_secret(house.secret)
        found = await house.store.find_principals([digest, bytes(32)])
        assert set(found) == {digest}
        principal = found[digest]
        assert (principal.key_id, principal.environment_id, principal.org_id) == (
            house.key.id,
            house.environment.id,
            house.org.id,
        )
        assert (principal.role, principal.plan, principal.expires_at) == ("developer", "serverless", None)
        assert (principal.org_state, principal.environment_state, principal.key_state) == ("active",) * 3
        assert principal.allowed_models is None
        assert principal.region_preferences == ("in-mumbai", "us-east")

    async def test_tells_an_operators_keys(self, house: House) -> None:
        digest = keys.hash_secret(house.secret)
        assert not (await house.store.find_principals([digest]))[digest].is_operator
        before = await house.tenancy_counter()
        org = await house.store.update_org(house.org.id, {"is_operator": True}, actor=ACTOR)
        assert org.is_operator
        assert (await house.store.find_principals([digest]))[digest].is_operator
        assert await house.tenancy_counter() > before

    async def test_puts_the_environments_home_region_first(self, house: House) -> None:
        await house.store.update_environment(house.environment.id, {"home_region": "us-east"}, actor=ACTOR)
        principal = (await house.store.find_principals([keys.hash_secret(house.secret)])).popitem()[1]
        assert principal.region_preferences == ("us-east", "in-mumbai")

    async def test_shows_each_layers_limits_as_stored(self, house: House) -> None:
        await house.store.set_limits("global", GLOBAL_SUBJECT, {"concurrency": 500}, actor=ACTOR)
        await house.store.set_limits("org", house.org.id, {"monthly_spend_microdollars": 2**53 + 1}, actor=ACTOR)
        await house.store.set_limits(
            "key", house.key.id, {"requests_per_min": -1}, dry_run=["concurrency"], actor=ACTOR
        )
        principal = (await house.store.find_principals([keys.hash_secret(house.secret)])).popitem()[1]
        assert tuple(row.layer for row in principal.limits) == LAYERS
        assert principal.limits == (
            LimitRow("global", GLOBAL_SUBJECT, concurrency=500),
            LimitRow("org", house.org.id, monthly_spend_microdollars=2**53 + 1),
            LimitRow("environment", house.environment.id),
            LimitRow("key", house.key.id, requests_per_min=-1, dry_run=frozenset({"concurrency"})),
        )

    async def test_many_at_once(self, house: House) -> None:
        secrets = [(await make_key(house.store, house.environment))[1] for _ in range(5)]
        found = await house.store.find_principals([keys.hash_secret(secret) for secret in [*secrets, house.secret]])
        assert len(found) == 6

    async def test_nobody(self, house: House) -> None:
        assert await house.store.find_principals([]) == {}


class TestOrgs:
    async def test_a_repeated_creation_returns_the_first(self, house: House) -> None:
        before = await house.actions()
        again, is_new = await house.store.create_org(new_id(), "acme", plan="enterprise", actor=ACTOR)
        assert (again, is_new) == (house.org, False)
        assert await house.actions() == before

    async def test_racing_creations_make_one(self, house: House) -> None:
        made = await asyncio.gather(*(house.store.create_org(new_id(), "race", actor=ACTOR) for _ in range(6)))
        assert sum(is_new for _, is_new in made) == 1
        assert len({org.id for org, _ in made}) == 1
        assert (await house.actions()).count(("org.create", ids.ORG.show(made[0][0].id))) == 1

    async def test_an_update_keeps_what_is_left_out(self, house: House) -> None:
        updated = await house.store.update_org(house.org.id, {"plan": "enterprise"}, actor=ACTOR)
        assert (updated.plan, updated.state, updated.region_preferences) == (
            "enterprise",
            "active",
            ("in-mumbai", "us-east"),
        )
        assert await house.store.get_org(name="acme") == updated
        assert await house.last_details() == {"plan": {"from": "serverless", "to": "enterprise"}}

    async def test_an_update_to_the_same_leaves_no_trace(self, house: House) -> None:
        before = await house.actions()
        await house.store.update_org(
            house.org.id, {"state": "active", "region_preferences": ["in-mumbai", "us-east"]}, actor=ACTOR
        )
        assert await house.actions() == before

    async def test_what_is_not_there(self, house: House) -> None:
        for attempt in (
            house.store.get_org(name="nobody"),
            house.store.get_org(org_id=new_id()),
            house.store.update_org(new_id(), {"state": "suspended"}, actor=ACTOR),
            house.store.create_environment(new_id(), new_id(), "dev", actor=ACTOR),
        ):
            with pytest.raises(Rejected) as caught:
                await attempt
            assert (caught.value.status, caught.value.code) == (404, "org_not_found")

    async def test_pages_lose_and_repeat_none(self, house: House) -> None:
        for number in range(7):
            await house.store.create_org(new_id(), f"org-{number}", actor=ACTOR)
        names: list[str] = []
        after = None
        while page := await house.store.list_orgs(after=after, limit=3):
            names += [org.name for org in page]
            after = page[-1].id
        # Ids of one millisecond are in no order of their own.
        assert sorted(names) == ["acme", *(f"org-{number}" for number in range(7))]


class TestEnvironments:
    async def test_a_repeated_creation_returns_the_first(self, house: House) -> None:
        again, is_new = await house.store.create_environment(
            new_id(), house.org.id, "prod", home_region="us-east", actor=ACTOR
        )
        assert (again, is_new) == (house.environment, False)

    async def test_models_are_set_and_taken_away(self, house: House) -> None:
        change = {"allowed_models": ["llama-3-8b"], "state": "suspended"}
        updated = await house.store.update_environment(house.environment.id, change, actor=ACTOR)
        assert (updated.allowed_models, updated.state) == (("llama-3-8b",), "suspended")
        principal = (await house.store.find_principals([keys.hash_secret(house.secret)])).popitem()[1]
        assert principal.allowed_models == {"llama-3-8b"}
        assert principal.environment_state == "suspended"
        updated = await house.store.update_environment(house.environment.id, {"allowed_models": None}, actor=ACTOR)
        assert updated.allowed_models is None

    async def test_are_listed_by_org_and_name(self, house: House) -> None:
        other, _ = await house.store.create_org(new_id(), "other", actor=ACTOR)
        await house.store.create_environment(new_id(), other.id, "prod", actor=ACTOR)
        await house.store.create_environment(new_id(), house.org.id, "dev", actor=ACTOR)
        names = [(row.org_name, row.name) for row in await house.store.list_environments(org_id=house.org.id)]
        assert names == [("acme", "prod"), ("acme", "dev")]
        assert len(await house.store.list_environments(name="prod")) == 2


class TestKeys:
    async def test_a_change_of_state_moves_the_counter_and_is_audited(self, house: House) -> None:
        before = await house.tenancy_counter()
        await house.store.set_key_state(house.key.id, "suspended", actor=ACTOR)
        assert await house.tenancy_counter() > before
        assert (await house.actions())[-1] == ("key.update", ids.KEY.show(house.key.id))
        assert await house.last_details() == {"state": {"from": "active", "to": "suspended"}}

    async def test_revoking_is_for_ever(self, house: House) -> None:
        await house.store.set_key_state(house.key.id, "revoked", actor=ACTOR)
        assert (await house.store.set_key_state(house.key.id, "revoked", actor=ACTOR)).state == "revoked"
        for state in ("active", "suspended"):
            with pytest.raises(Rejected, match="for ever") as caught:
                await house.store.set_key_state(house.key.id, state, actor=ACTOR)
            assert caught.value.status == 409
        assert (await house.actions()).count(("key.update", ids.KEY.show(house.key.id))) == 1

    async def test_are_listed_by_org_and_environment(self, house: House) -> None:
        other, _ = await house.store.create_org(new_id(), "other", actor=ACTOR)
        environment, _ = await house.store.create_environment(new_id(), other.id, "dev", actor=ACTOR)
        foreign, _ = await make_key(house.store, environment)
        assert await house.store.list_keys(org_id=house.org.id) == [house.key]
        assert await house.store.list_keys(environment_id=environment.id) == [foreign]
        assert len(await house.store.list_keys()) == 2


class TestRotation:
    async def rotate(self, house: House, **more: Any) -> tuple[Key, Key, str]:
        secret = keys.mint("prod", new_id().bytes + bytes(8))
        options: dict[str, Any] = {"overlap": timedelta(hours=1), "expires_at": None} | more
        old, new = await house.store.rotate_key(
            house.key.id,
            new_id(),
            secret_hash=keys.hash_secret(secret),
            hint=keys.hint_of(secret),
            actor=ACTOR,
            **options,
        )
        return old, new, secret

    async def test_both_work_until_the_overlap_ends(self, house: House) -> None:
        old, new, secret = await self.rotate(house)
        found = await house.store.find_principals([keys.hash_secret(house.secret), keys.hash_secret(secret)])
        assert [principal.key_state for principal in found.values()] == ["active", "active"]
        ends_at = found[keys.hash_secret(house.secret)].expires_at
        assert ends_at == old.expires_at
        assert ends_at is not None
        assert abs(ends_at - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=1)
        assert found[keys.hash_secret(secret)].expires_at is None
        assert (new.environment_id, new.role, new.name) == (old.environment_id, old.role, old.name)
        assert (await house.last_details())["successor"] == ids.KEY.show(new.id)

    async def test_the_successor_has_the_same_limits(self, house: House) -> None:
        changes = {"requests_per_min": 7, "concurrency": -1}
        await house.store.set_limits("key", house.key.id, changes, dry_run=["tokens_per_day"], actor=ACTOR)
        _, new, _ = await self.rotate(house)
        assert await house.store.get_limits("key", new.id) == LimitRow(
            "key", new.id, requests_per_min=7, concurrency=-1, dry_run=frozenset({"tokens_per_day"})
        )

    async def test_an_earlier_end_stays(self, house: House) -> None:
        soon = datetime.now(UTC) + timedelta(minutes=5)
        await self.rotate(house, overlap=timedelta(minutes=5))
        old, _, _ = await self.rotate(house, overlap=timedelta(days=1))
        assert old.expires_at is not None
        assert old.expires_at < soon + timedelta(minutes=1)

    @pytest.mark.parametrize("state", ["suspended", "revoked"])
    async def test_a_key_out_of_use_has_no_successor(self, house: House, state: str) -> None:
        await house.store.set_key_state(house.key.id, state, actor=ACTOR)
        with pytest.raises(Rejected) as caught:
            await self.rotate(house)
        assert caught.value.status == 409
        assert len(await house.store.list_keys()) == 1

    async def test_an_expired_key_has_none_either(self, house: House) -> None:
        await self.rotate(house, overlap=timedelta(0))
        with pytest.raises(Rejected, match="expired"):
            await self.rotate(house)


class TestLimits:
    async def test_a_partial_update_keeps_the_others(self, house: House) -> None:
        subject = house.key.id
        await house.store.set_limits("key", subject, {"requests_per_min": 10, "concurrency": 3}, actor=ACTOR)
        row = await house.store.set_limits("key", subject, {"concurrency": -1, "tokens_per_min": 0}, actor=ACTOR)
        assert row == LimitRow("key", subject, requests_per_min=10, concurrency=-1, tokens_per_min=0)
        row = await house.store.set_limits("key", subject, {"requests_per_min": None}, actor=ACTOR)
        assert row == LimitRow("key", subject, concurrency=-1, tokens_per_min=0)
        assert await house.store.get_limits("key", subject) == row

    async def test_dry_run_is_kept_until_it_is_set_anew(self, house: House) -> None:
        subject = house.key.id
        first = await house.store.set_limits("key", subject, {}, dry_run=["concurrency"], actor=ACTOR)
        assert first == LimitRow("key", subject, dry_run=frozenset({"concurrency"}))
        assert (await house.last_details()) == {"dry_run": ["concurrency"]}
        assert (await house.store.set_limits("key", subject, {"concurrency": 3}, actor=ACTOR)).dry_run == {
            "concurrency"
        }
        last = await house.store.set_limits("key", subject, {}, dry_run=[], actor=ACTOR)
        assert last == LimitRow("key", subject, concurrency=3) == await house.store.get_limits("key", subject)

    async def test_racing_partial_updates_lose_nothing(self, house: House) -> None:
        names = ("requests_per_min", "tokens_per_min", "tokens_per_day", "concurrency")
        await asyncio.gather(*(house.store.set_limits("key", house.key.id, {name: 9}, actor=ACTOR) for name in names))
        assert await house.store.get_limits("key", house.key.id) == LimitRow(
            "key", house.key.id, **dict.fromkeys(names, 9)
        )

    @pytest.mark.parametrize("layer", ["org", "environment", "key"])
    async def test_an_unknown_subject(self, house: House, layer: str) -> None:
        for attempt in (
            house.store.get_limits(layer, new_id()),
            house.store.set_limits(layer, new_id(), {"concurrency": 1}, actor=ACTOR),
        ):
            with pytest.raises(Rejected) as caught:
                await attempt
            assert caught.value.status == 404
        assert await house.pool.fetchval("SELECT count(*) FROM limits") == 0

    async def test_only_an_org_has_a_spend_limit(self, house: House) -> None:
        with pytest.raises(Rejected, match="Only an org"):
            await house.store.set_limits("key", house.key.id, {"monthly_spend_microdollars": 1}, actor=ACTOR)


class TestAuditing:
    async def test_every_write_leaves_one_row(self, house: House) -> None:
        """H11."""
        org, environment, key = (
            ids.ORG.show(house.org.id),
            ids.ENVIRONMENT.show(house.environment.id),
            ids.KEY.show(house.key.id),
        )
        assert await house.actions() == [("org.create", org), ("environment.create", environment), ("key.create", key)]
        await house.store.update_org(house.org.id, {"state": "suspended"}, actor=ACTOR)
        await house.store.update_environment(house.environment.id, {"home_region": "us-east"}, actor=ACTOR)
        await house.store.set_limits("org", house.org.id, {"tokens_per_day": 5}, actor=ACTOR)
        await house.store.set_limits("global", GLOBAL_SUBJECT, {"tokens_per_day": 5}, actor=ACTOR)
        assert (await house.actions())[3:] == [
            ("org.update", org),
            ("environment.update", environment),
            ("limits.set", org),
            ("limits.set", "global"),
        ]

    async def test_a_write_that_fails_leaves_neither(self, house: House) -> None:
        before = await house.actions()
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await house.store.update_environment(house.environment.id, {"home_region": "atlantis"}, actor=ACTOR)
        assert await house.actions() == before

    async def test_a_write_whose_audit_row_fails_is_undone(self, house: House) -> None:
        await house.pool.execute("ALTER TABLE audit_log ADD CONSTRAINT full_disk CHECK (seq < 4)")
        with pytest.raises(asyncpg.CheckViolationError):
            await house.store.set_key_state(house.key.id, "revoked", actor=ACTOR)
        assert (await house.store.get_key(house.key.id)).state == "active"

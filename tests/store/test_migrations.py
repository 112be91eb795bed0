from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio

from crosslogic.dev.postgres import Postgres
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.store.migrations import MIGRATIONS_DIR, migrate


@pytest_asyncio.fixture
async def empty(postgres: Postgres) -> AsyncIterator[str]:
    """The URL of a database without a schema."""
    name = f"test_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.url_of("postgres"))
    await admin.execute(f"CREATE DATABASE {name}")
    yield postgres.url_of(name)
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    (tmp_path / "0001_one.sql").write_text("CREATE TABLE one (x INTEGER); CREATE TABLE two (x INTEGER);")
    (tmp_path / "0002_two.sql").write_text("INSERT INTO one VALUES (1);")
    return tmp_path


class TestMigrate:
    async def test_applies_everything_once(self, empty: str) -> None:
        expected = sorted(path.stem for path in MIGRATIONS_DIR.glob("*.sql"))
        assert await migrate(empty) == expected
        assert await migrate(empty) == []

    async def test_of_two_at_once_is_one(self, empty: str) -> None:
        applied = await asyncio.gather(*(migrate(empty) for _ in range(3)))
        assert sorted(name for names in applied for name in names) == sorted(
            path.stem for path in MIGRATIONS_DIR.glob("*.sql")
        )

    async def test_leaves_nothing_of_one_that_fails(self, empty: str, scripts: Path) -> None:
        (scripts / "0003_three.sql").write_text("CREATE TABLE three (x INTEGER); SELECT nonsense;")
        with pytest.raises(asyncpg.PostgresError):
            await migrate(empty, scripts)
        (scripts / "0003_three.sql").write_text("CREATE TABLE three (x INTEGER);")
        assert await migrate(empty, scripts) == ["0003_three"]

    async def test_refuses_a_history_that_is_not_its_own(self, empty: str, scripts: Path) -> None:
        await migrate(empty, scripts)
        (scripts / "0002_two.sql").write_text("INSERT INTO one VALUES (2);")
        with pytest.raises(Rejected, match="0002_two was changed"):
            await migrate(empty, scripts)
        (scripts / "0002_two.sql").unlink()
        with pytest.raises(Rejected, match="does not know"):
            await migrate(empty, scripts)

    async def test_refuses_a_migration_that_comes_too_late(self, empty: str, scripts: Path) -> None:
        await migrate(empty, scripts)
        (scripts / "0001_before.sql").write_text("SELECT 1;")
        with pytest.raises(Rejected, match="renumber"):
            await migrate(empty, scripts)

    async def test_says_when_postgres_is_away(self) -> None:
        with pytest.raises(Unavailable):
            await migrate("postgresql://127.0.0.1:1/x")

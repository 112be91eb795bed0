"""Every statement of the stores against the migrated schema: a typo must not wait for the statement's first use."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import asyncpg
import pytest

import crosslogic.store

# Not statements but words that go into one.
WORDS = {"crosslogic.store.migrations.LOCK_TIMEOUT", "crosslogic.store.migrations.WAIT_FOR_OTHERS"}
# PREPARE is for queries; these change the schema and run with every migration.
DEFINITIONS = {"crosslogic.store.migrations.CREATE_HISTORY"}


def statements() -> Iterator[tuple[str, str]]:
    """Every UPPERCASE text of the store's modules and classes, by its dotted name."""
    for found in pkgutil.iter_modules(crosslogic.store.__path__, "crosslogic.store."):
        module = importlib.import_module(found.name)
        owned = [held for _, held in inspect.getmembers(module, inspect.isclass) if held.__module__ == found.name]
        for owner in (module, *owned):
            place = found.name if owner is module else f"{found.name}.{owner.__name__}"
            for name, value in vars(owner).items():
                if name.lstrip("_").isupper() and isinstance(value, str) and f"{place}.{name}" not in WORDS:
                    yield f"{place}.{name}", value


STATEMENTS = dict(statements())


def test_the_walk_finds_all_stores() -> None:
    modules = {name.removeprefix("crosslogic.store.").split(".")[0] for name in STATEMENTS}
    assert {"audit", "catalog", "changes", "migrations", "nodes", "tenancy", "usage"} <= modules


async def test_every_statement_prepares(database: str) -> None:
    connection = await asyncpg.connect(database)
    failures: list[str] = []
    try:
        for name, statement in STATEMENTS.items():
            if name in DEFINITIONS:
                continue
            try:
                await connection.prepare(statement)
            except asyncpg.PostgresError as error:
                failures.append(f"{name}: {error}")
    finally:
        await connection.close()
    assert failures == []


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_what_is_left_out_is_no_query(name: str) -> None:
    assert STATEMENTS[name].split()[0] == "CREATE"

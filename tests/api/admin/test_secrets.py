"""H9: a key's secret is in the answer that made it, and nowhere else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import asyncpg
import httpx
import pytest

from crosslogic.settings import Settings
from tests.api.admin.server import TOKEN


async def everything_in(dsn: str) -> str:
    """Every value of every row of every table, as text; bytes as they are and in hexadecimal."""
    connection = await asyncpg.connect(dsn)
    try:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        parts: list[str] = []
        for table in tables:
            for row in await connection.fetch(f'SELECT * FROM "{table["tablename"]}"'):
                for value in row.values():
                    parts.append(value.hex() + value.decode("latin-1") if isinstance(value, bytes) else str(value))
        assert len(tables) >= 10
        return "\n".join(parts)
    finally:
        await connection.close()


def pieces(secret: str) -> list[str]:
    """Parts of it that would give it away: any eight characters of the random part, and its bytes in hexadecimal."""
    random = secret.split("_")[2][:26]
    return [random[at : at + 8] for at in range(len(random) - 7)] + [secret.encode().hex()]


class TestCanary:
    def test_a_secret_is_in_no_table_log_or_error(
        self, api: httpx.Client, made: Callable[..., Any], settings: Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        made("/orgs", name="acme")
        made("/environments", org="acme", name="prod")
        key = made("/keys", org="acme", environment="prod", name="canary")
        rotated = made(f"/keys/{key['id']}/rotate")
        secrets = [key["secret"], rotated["new"]["secret"]]
        answers: list[str] = []
        for secret in secrets:
            # A secret that strays into any place of a request comes back in no answer.
            for answer in (
                api.get(f"/keys/{secret}"),
                api.get("/keys", params={"org": secret}),
                api.post("/keys", json={"org": "acme", "environment": secret}),
                api.post("/keys", json={secret: "acme"}),
                api.get("/orgs", headers={"authorization": f"Bearer {secret}"}),
                api.put(f"/limits/key/{key['id']}", json={"concurrency": secret}),
                api.get("/audit", params={"subject": secret}),
                api.post("/nodes/join", json={"model": secret, "region": "us-east", "endpoint": "http://[::1]"}),
                # Temporal is away: this one is logged.
                api.post("/nodes", json={"model": "llama-7b", "region": "us-east", "gpu": secret}),
            ):
                answers.append(answer.text + str(dict(answer.headers)))
        answers += [api.get(path).text for path in ("/keys", f"/keys/{key['id']}", "/audit?limit=200", "/orgs")]
        stored = asyncio.run(everything_in(settings.database_url.get_secret_value()))
        assert key["id"][4:8] in "".join(answers), "the scan reads answers"
        assert "canary" in stored, "the scan reads tables"
        assert "Temporal cannot be reached" in caplog.text, "the scan reads logs"
        ours = "\n".join(
            record.getMessage() + (record.exc_text or "")
            for record in caplog.records
            # The access log repeats the path that a client chose to write a secret into; production runs without it.
            if record.name not in ("uvicorn.access", "httpx", "httpcore.http11", "httpcore.connection")
        )
        for secret in [*secrets, TOKEN]:
            for piece in pieces(secret) if secret != TOKEN else [TOKEN]:
                assert piece not in stored
                assert piece not in ours
                assert piece not in "".join(answers)

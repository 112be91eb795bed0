"""The launcher of the embedded Postgres: first start, kill, start again."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path

import asyncpg
import pytest

from crosslogic.dev import postgres as module
from crosslogic.dev.parts import PartError
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.state import free_port


async def start(postgres: Postgres) -> subprocess.Popen[bytes]:
    launch = await asyncio.to_thread(postgres.prepare)
    process = await asyncio.to_thread(
        lambda: subprocess.Popen(
            list(launch.command),
            env=dict(launch.environment),
            cwd=launch.cwd,
            user=launch.user,
            group=launch.user,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )
    until = time.monotonic() + 60
    try:
        while not await postgres.is_ready():
            assert process.poll() is None, "Postgres ended by itself"
            assert time.monotonic() < until, "Postgres did not start"
            await asyncio.sleep(0.05)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def stop(postgres: Postgres, process: subprocess.Popen[bytes]) -> int:
    process.send_signal(postgres.stop_signal)
    return process.wait(10)


async def survive(postgres: Postgres) -> None:
    """Write, be killed, and read it again; then stop cleanly."""
    process = await start(postgres)
    connection = await asyncpg.connect(postgres.url)
    await connection.execute("CREATE TABLE kept AS SELECT 42 AS number")
    process.kill()
    process.wait()
    process = await start(postgres)
    connection = await asyncpg.connect(postgres.url)
    assert await connection.fetchval("SELECT number FROM kept") == 42
    assert str(await connection.fetchval("SELECT uuidv7()"))
    await connection.close()
    assert stop(postgres, process) == 0


class TestPostgres:
    async def test_data_survives_a_kill(self, tmp_path: Path) -> None:
        await survive(Postgres(tmp_path / "postgres", free_port(), "secret"))

    async def test_a_half_made_cluster_is_made_anew(self, tmp_path: Path) -> None:
        left = tmp_path / "postgres" / "data.unfinished"
        left.mkdir(parents=True)
        (left / "PG_VERSION").write_text("18\n")
        postgres = Postgres(tmp_path / "postgres", free_port(), "secret")
        assert stop(postgres, await start(postgres)) == 0
        assert not left.exists()

    async def test_a_lock_with_the_pid_of_another_program_does_not_stop_it(self, tmp_path: Path) -> None:
        postgres = Postgres(tmp_path / "postgres", free_port(), "secret")
        stop(postgres, await start(postgres))
        lock = tmp_path / "postgres" / "data" / "postmaster.pid"
        # A program of the same user: Postgres takes it for its own predecessor. (Its own parent it would not.)
        other = await asyncio.to_thread(lambda: subprocess.Popen(["sleep", "60"]))
        try:
            lock.write_text(f"{other.pid}\n")
            os.chown(lock, lock.parent.stat().st_uid, lock.parent.stat().st_gid)
            assert stop(postgres, await start(postgres)) == 0
        finally:
            other.kill()
            other.wait()

    async def test_a_wrong_password_is_told_and_not_tried_for_ever(self, tmp_path: Path) -> None:
        postgres = Postgres(tmp_path / "postgres", free_port(), "secret")
        process = await start(postgres)
        with pytest.raises(PartError, match="--fresh"):
            await Postgres(tmp_path / "postgres", postgres.port, "other").is_ready()
        stop(postgres, process)

    async def test_asks_for_the_password_and_listens_on_loopback_only(self, tmp_path: Path) -> None:
        postgres = Postgres(tmp_path / "postgres", free_port(), "secret")
        process = await start(postgres)
        try:
            with pytest.raises(asyncpg.InvalidPasswordError):
                await asyncpg.connect(postgres.url.replace("secret", "guess"))
            connection = await asyncpg.connect(postgres.url)
            assert await connection.fetchval("SHOW listen_addresses") == "127.0.0.1"
            await connection.close()
        finally:
            stop(postgres, process)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")
class TestPostgresOfRoot:
    @pytest.fixture(autouse=True)
    def _without_namespaces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # As in a container that forbids user namespaces.
        monkeypatch.setattr(module, "_NAMESPACE", "false")

    async def test_runs_as_nobody(self, tmp_path: Path) -> None:
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o001 == 0:
                folder.chmod(0o755)
        await survive(Postgres(tmp_path / "postgres", free_port(), "secret"))
        assert (tmp_path / "postgres" / "data").stat().st_uid != 0

    async def test_puts_data_where_nobody_can_enter(self, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o700)
        postgres = Postgres(closed / "postgres", free_port(), "secret")
        try:
            await survive(postgres)
            assert not (closed / "postgres" / "data").exists()
        finally:
            postgres.forget()
        assert not module._elsewhere(postgres.folder).exists()  # pyright: ignore[reportPrivateUsage]

    async def test_a_state_made_in_a_namespace_goes_on_without_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o001 == 0:
                folder.chmod(0o755)
        port = free_port()
        first = Postgres(tmp_path / "postgres", port, "secret")
        stop(first, await start(first))
        monkeypatch.undo()
        await survive(Postgres(tmp_path / "postgres", port, "secret"))

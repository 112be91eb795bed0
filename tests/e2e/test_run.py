"""`./run` itself: stopping, going on, starting over, and what a kill leaves."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import asyncpg
import psutil
import pytest

from tests.e2e.stack import ROOT, Stack, eventually, free_port, is_gone


def pids(stack: Stack) -> list[int]:
    return [process.pid for process in psutil.Process(stack.process.pid).children(recursive=True)]


class TestRun:
    def test_stops_cleanly_and_goes_on_with_the_same_state(self, tmp_path: Path) -> None:
        port = free_port()
        first = Stack(tmp_path, port)
        try:
            first.wait_until_serving()
            nodes = {node["id"] for node in first.wait_for_nodes(3, model="llama-3-8b")}
            first.wait_for_nodes(1, model="bge-base-en")
            began = pids(first)
            for shown in (first.url, "sk_dev_demo", "curl"):
                eventually(lambda shown=shown: shown in first.screen, within_s=20, what=f"{shown} in the summary")
            assert first.endpoints["temporal_ui"] in first.screen
        finally:
            seconds = first.stop()
        assert seconds < 5
        assert first.process.returncode == 0
        assert all(is_gone(pid) for pid in began)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1)

        second = Stack(tmp_path, port)
        try:
            second.wait_until_serving()
            again = {node["id"] for node in second.wait_for_nodes(3, model="llama-3-8b")}
            assert again & nodes, "machines that were switched off with the stack are switched on with it"
            refused = Stack(tmp_path, free_port())
            assert refused.process.wait(30) == 1
            eventually(lambda: "already running" in refused.screen, within_s=5, what="the reason")
            # SIGKILL leaves everything behind but a mess.
            left = pids(second)
            second.process.send_signal(signal.SIGKILL)
            second.process.wait()
        finally:
            second.stop()
        third = Stack(tmp_path, port)
        try:
            # What was left behind answers until it is stopped: only the third's own words tell that it is up itself.
            eventually(lambda: "Inference Cloud is up" in third.screen, within_s=120, what="the third one's summary")
            third.wait_until_serving()
            third.wait_for_nodes(3, model="llama-3-8b")
            engines = {machine["pid"] for machine in third.machines()}
            assert len(engines) == 4, "no engine is left over"
            leftovers = [pid for pid in left if not is_gone(pid) and pid not in engines]
            assert not leftovers, [psutil.Process(pid).cmdline() for pid in leftovers]
        finally:
            third.stop()

        fresh = Stack(tmp_path, port, arguments=("--state", str(tmp_path), "--port", str(port), "--fresh"))
        try:
            fresh.wait_until_serving()
            assert not {node["id"] for node in fresh.wait_for_nodes(3, model="llama-3-8b")} & again
        finally:
            fresh.stop()

    def test_two_instances_coexist(self, stack: Stack, tmp_path: Path) -> None:
        other = Stack(tmp_path, free_port())
        try:
            other.wait_until_serving()
            assert stack.ask("hi").status_code == 200
            assert other.endpoints["postgres"] != stack.endpoints["postgres"]
        finally:
            other.stop()
        assert stack.ask("hi").status_code == 200

    async def test_servers_that_are_given_are_not_started(self, stack: Stack, tmp_path: Path) -> None:
        connection = await asyncpg.connect(stack.endpoints["postgres"])
        await connection.execute("CREATE DATABASE given")
        await connection.close()
        given = {
            "CROSSLOGIC_DATABASE_URL": stack.endpoints["postgres"].rsplit("/", 1)[0] + "/given",
            "CROSSLOGIC_REDIS_URL": stack.endpoints["redis"],
            "CROSSLOGIC_REDIS_PREFIX": "given:",
        }
        other = Stack(tmp_path, free_port(), settings=given)
        try:
            other.wait_until_serving()
            assert other.endpoints["postgres"] == given["CROSSLOGIC_DATABASE_URL"]
            for server in ("postgres", "valkey-server"):
                with pytest.raises(LookupError):
                    other.part(server)
        finally:
            assert other.stop() < 6

    def test_memory_of_the_whole_stack(self, stack: Stack) -> None:
        sizes = stack.memory_mib()
        for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
            print(f"{size:7.0f} MiB  {name}")
        print(f"{sum(sizes.values()):7.0f} MiB  in all")
        assert sum(sizes.values()) < 1536


class TestDoctor:
    def test_says_that_a_port_is_taken(self, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            words = [str(ROOT / "run"), "doctor", "--state", str(tmp_path), "--port", str(port)]
            said = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert said.returncode == 1
        assert str(port) in said.stdout + said.stderr
        assert "--port" in said.stdout + said.stderr

    def test_finds_nothing_wrong_with_a_healthy_stack(self, stack: Stack) -> None:
        said = stack.command("doctor", "--port", str(stack.port))
        assert said.returncode == 0, said.stdout + said.stderr


class TestStop:
    def test_a_stack_that_is_still_starting_stops_too(self, tmp_path: Path) -> None:
        stack = Stack(tmp_path, free_port())
        eventually(lambda: stack.lines, within_s=30, what="a first line")
        time.sleep(1.0)
        assert stack.stop() < 6

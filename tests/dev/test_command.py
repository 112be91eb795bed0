"""`./run` without a stack: how arguments are read, what the doctor finds, what is refused before anything starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from crosslogic.bootstrap import ROOT
from crosslogic.cli.commands import app
from crosslogic.dev.command import HELP, Words
from crosslogic.dev.processes import ProcessId
from crosslogic.dev.state import State, StateError, free_port, write_json

RUN = str(ROOT / "run")


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, RUN, *words], capture_output=True, text=True, timeout=120, cwd=cwd)


class TestWords:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ([], Words()),
            (["--fresh"], Words(options=["--fresh"])),
            (["--state", "a b", "--port", "9"], Words(state="a b", options=["--port", "9"])),
            (["--state=x", "--port=9"], Words(state="x", options=["--port", "9"])),
            (["keys", "list", "--org", "demo"], Words(command="keys", rest=["list", "--org", "demo"])),
            (["--state", "x", "doctor", "--port", "9"], Words(state="x", command="doctor", rest=["--port", "9"])),
        ],
    )
    def test_takes_them_apart(self, given: list[str], expected: Words) -> None:
        assert Words.of(given) == expected

    def test_a_missing_value_is_told(self) -> None:
        with pytest.raises(SystemExit, match="--state wants a value"):
            Words.of(["--state"])

    def test_the_help_names_every_command_and_no_other(self) -> None:
        groups = {group.name for group in app.registered_groups}
        commands = {command.name for command in app.registered_commands}
        listed = HELP.partition("explains each:\n")[2].partition("\n\n")[0]
        named = {word for line in listed.splitlines() for word in line[:42].split()}
        assert named == groups | commands


class TestRun:
    def test_help_needs_nothing(self) -> None:
        for words in (["--help"], ["help"]):
            assert run(*words).stdout == HELP

    def test_a_command_finds_the_project_from_anywhere(self, tmp_path: Path) -> None:
        # What lies where the user stands must not be taken for ours.
        (tmp_path / "crosslogic").mkdir()
        (tmp_path / "crosslogic" / "__init__.py").write_text("raise RuntimeError")
        said = run("nodes", "--help", cwd=tmp_path)
        assert said.returncode == 0, said.stderr
        assert "join" in said.stdout

    def test_temporal_without_a_stack_says_so(self, tmp_path: Path) -> None:
        said = run("--state", str(tmp_path), "temporal", "workflow", "list")
        assert said.returncode == 1
        assert "./run" in said.stderr

    def test_a_taken_port_is_refused_before_anything_starts(self, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            said = run("--state", str(tmp_path / "state"), "--port", str(port))
        assert said.returncode == 1
        assert f"Port {port} is taken" in said.stderr
        assert "--port" in said.stderr
        assert not (tmp_path / "state" / "postgres").exists()

    @pytest.mark.parametrize("words", [[], ["--fresh"]])
    def test_a_directory_with_other_things_is_refused(self, tmp_path: Path, words: list[str]) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        said = run("--state", str(tmp_path), *words)
        assert said.returncode == 1
        assert "thesis.txt" in said.stderr
        assert (tmp_path / "thesis.txt").read_text() == "years of work"


class TestDoctor:
    def test_finds_nothing_wrong_where_nothing_is(self, tmp_path: Path) -> None:
        said = run("doctor", "--state", str(tmp_path / "state"), "--port", str(free_port()))
        assert said.returncode == 0, said.stdout
        assert "Nothing is wrong" in said.stdout
        assert not (tmp_path / "state").exists(), "looking must not change anything"

    def test_names_who_has_the_port_and_another_way(self, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            said = run("doctor", "--state", str(tmp_path), "--port", str(port))
        assert said.returncode == 1
        assert f"port {port} is taken by pid {os.getpid()}" in said.stdout
        assert "--port N" in said.stdout

    def test_names_what_a_killed_run_has_left(self, tmp_path: Path) -> None:
        with subprocess.Popen(["sleep", "60"]) as left:
            process = ProcessId.of(left.pid)
            assert process is not None
            write_json(tmp_path / "stack.json", {"supervisor": None, "parts": {"postgres": process.write()}})
            said = run("doctor", "--state", str(tmp_path), "--port", str(free_port()))
            left.kill()
        assert said.returncode == 1
        assert f"postgres (pid {left.pid})" in said.stdout

    def test_sees_a_directory_that_is_not_ours(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").touch()
        said = run("doctor", "--state", str(tmp_path), "--port", str(free_port()))
        assert said.returncode == 1
        assert "thesis.txt" in said.stdout

    def test_runs_before_anything_is_installed(self, tmp_path: Path) -> None:
        # No site-packages at all: what it imports must be the standard library's.
        words = [sys.executable, "-S", "-I", "-c"]
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from crosslogic.dev import command"
        subprocess.run([*words, code], check=True, timeout=60)


class TestState:
    def test_one_holder_at_a_time(self, tmp_path: Path) -> None:
        state = State.at(tmp_path)
        state.make()
        assert not state.is_held
        held = state.acquire()
        assert held is not None
        assert state.is_held
        assert state.acquire() is None
        os.close(held)
        assert not state.is_held

    def test_clear_keeps_the_lock_and_nothing_else(self, tmp_path: Path) -> None:
        state = State.at(tmp_path)
        state.make()
        held = state.acquire()
        state.write("secrets.json", {"a": "b"})
        (state.logs / "api.log").write_text("x")
        state.clear()
        assert state.read("secrets.json") == {}
        assert not (state.logs / "api.log").exists()
        assert state.is_held, "whoever starts over must not lose the directory to another"
        assert held is not None
        os.close(held)

    def test_files_are_the_owners_alone_and_a_crash_leaves_the_old_one(self, tmp_path: Path) -> None:
        state = State.at(tmp_path)
        state.make()
        state.write("secrets.json", {"a": "b"})
        assert (tmp_path / "secrets.json").stat().st_mode & 0o077 == 0
        (tmp_path / "secrets.json.new").write_text('{"a": ')
        assert state.read("secrets.json") == {"a": "b"}
        state.make()

    def test_refuses_what_is_not_ours(self, tmp_path: Path) -> None:
        (tmp_path / "photo.jpg").touch()
        for act in (State.at(tmp_path).make, State.at(tmp_path).clear):
            with pytest.raises(StateError, match=r"photo\.jpg"):
                act()


class TestProcessId:
    def test_knows_a_process_from_another_with_its_pid(self) -> None:
        with subprocess.Popen(["sleep", "60"]) as process:
            known = ProcessId.of(process.pid)
            assert known is not None
            assert known.is_alive
            assert ProcessId.read(known.write()) == known
            impostor = ProcessId(process.pid, "another time")
            assert not impostor.is_alive
            impostor.signal(signal.SIGKILL)
            impostor.kill()
            assert known.is_alive
            known.kill()
            while known.is_alive:
                pass
            # Dead, and not waited for yet: a zombie is no process any more.
            assert ProcessId.of(process.pid) is None

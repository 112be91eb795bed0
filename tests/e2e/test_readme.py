"""What the README tells a stranger to do, done literally in a fresh checkout."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import ROOT, Stack, eventually, python

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def block_with(language: str, mark: str) -> str:
    """The one block that mentions `mark`."""
    (found,) = [block for block in blocks(language) if mark in block]
    return found


def shell(checkout: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-ec", command], cwd=checkout, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows, in a place of their own: no environment, no state."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def stranger(checkout: Path) -> Iterator[Stack]:
    assert "./run " in blocks("sh")[0]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 8080)) != 0, "port 8080 is taken: the README's commands need it"
    stack = Stack(checkout / ".crosslogic", 8080, root=checkout, arguments=())
    try:
        seconds = stack.wait_until_serving(within_s=300)
        print(f"\nfirst answer {seconds:.1f} s after ./run in a fresh checkout, installation included")
        eventually(lambda: "curl" in stack.screen, within_s=60, what="the summary")
        yield stack
    finally:
        stack.stop()


class TestReadme:
    def test_the_curl(self, stranger: Stack, checkout: Path) -> None:
        done = shell(checkout, block_with("sh", "curl").replace("curl ", "curl -sSi ", 1))
        assert done.returncode == 0, done.stderr
        head, _, body = done.stdout.replace("\r\n", "\n").partition("\n\n")
        assert " 200 " in head.splitlines()[0]
        document = json.loads(body)
        assert document["object"] == "chat.completion"
        assert document["choices"][0]["message"]["content"]
        assert f"x-crosslogic-node: {document['crosslogic']['node']}" in head
        assert "x-crosslogic-region: in-mumbai" in head

    def test_the_sdk(self, stranger: Stack, tmp_path: Path) -> None:
        script = tmp_path / "example.py"
        script.write_text(block_with("python", "OpenAI"))
        done = subprocess.run([python(), str(script)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) > 3

    def test_starting_a_node(self, stranger: Stack, checkout: Path) -> None:
        before = len(stranger.wait_for_nodes(2, model="llama-3-8b", region="in-mumbai"))
        done = shell(checkout, block_with("sh", "temporal workflow start"))
        assert done.returncode == 0, done.stderr + done.stdout
        assert "node_" in done.stdout
        stranger.wait_for_nodes(before + 1, model="llama-3-8b", region="in-mumbai")

    def test_the_doctor(self, stranger: Stack, checkout: Path) -> None:
        done = shell(checkout, "./run doctor")
        assert done.returncode == 0, done.stdout + done.stderr

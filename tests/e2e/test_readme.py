"""The README, followed to the letter. Only the port and the state directory are this test's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from tests.e2e.stack import ROOT, Stack


def blocks(language: str, containing: str) -> str:
    """The README's one fenced block in this language that contains a text."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in found if containing in block]
    return block


def follow(stack: Stack, program: list[str], text: str) -> str:
    """Run a block against this stack; what it printed. Its own words stand, but for port and state directory."""
    here = text.replace(":8080", f":{stack.port}").replace("./run ", f"./run --state {stack.state} ")
    environment = os.environ | {"NO_PROXY": "localhost,127.0.0.1"}
    done = subprocess.run(
        program, input=here, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


class TestReadme:
    def test_the_first_request_is_answered_and_says_by_whom(self, stack: Stack) -> None:
        answer = json.loads(follow(stack, ["bash", "-e"], blocks("sh", "curl")))
        assert answer["choices"][0]["message"]["content"]
        assert answer["crosslogic"]["region"] == "in-mumbai"
        assert re.fullmatch(r"node_[0-9a-z]{26}", answer["crosslogic"]["node"])

    def test_the_sdk_streams(self, stack: Stack) -> None:
        assert follow(stack, [sys.executable, "-"], blocks("python", "OpenAI")).strip()

    def test_the_temporal_command_line_starts_a_node_that_serves(self, stack: Stack) -> None:
        before = {node["id"] for node in stack.nodes()}
        printed = follow(stack, ["bash", "-e"], blocks("sh", "workflow start"))
        assert "NodeProvisioning" in printed
        assert any(node in printed for node in before), "`nodes list` shows the nodes"
        (new,) = {node["id"] for node in stack.wait_for_nodes(4, model="llama-3-8b")} - before
        assert stack.command("nodes", "drain", new).returncode == 0
        stack.wait_for_nodes(3, model="llama-3-8b")

"""Roll-outs on the whole stack: real engines of two revisions, and clients that notice nothing but the answers."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.e2e.stack import Stack, eventually

ALWAYS = 'root ::= "forty-two"'


class Clients:
    """Two clients that ask all the time; what they were answered, by status and text."""

    def __init__(self, stack: Stack, key: str) -> None:
        self._stack = stack
        self._key = key
        self._ending = threading.Event()
        self.answers: Counter[tuple[int, bool]] = Counter()

    def _ask(self) -> None:
        while not self._ending.is_set():
            try:
                answer = self._stack.ask("What is 6 times 7?", key=self._key, model="llama-7b", max_tokens=8)
                is_new = answer.is_success and answer.json()["choices"][0]["message"]["content"] == "forty-two"
                self.answers[answer.status_code, is_new] += 1
            except httpx.HTTPError:
                self.answers[0, False] += 1

    @contextmanager
    def asking(self) -> Generator[None]:
        """They ask for the life of the block."""
        threads = [threading.Thread(target=self._ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join()


def roll_out(stack: Stack, revision: int, **options: object) -> dict[str, object]:
    """Start it with the Temporal command line, as the runbook says, and wait for its end."""
    order = json.dumps({"deployment": "llama-7b", "revision": revision, "steps_bp": [5000, 10000], **options})
    words = ("--type", "DeploymentRollout", "--task-queue", "fleet", "--workflow-id", f"rollout/llama-7b/{revision}")
    done = stack.temporal("workflow", "execute", *words, "--input", order, "-o", "json", timeout_s=400)
    found: dict[str, object] = json.loads(done.stdout)
    return found


class TestRollout:
    def test_changes_the_answers_and_nothing_else(self, stack: Stack, key: str, tmp_path: Path) -> None:
        """F8: forth and back, with requests all the time and none that fails."""
        golden = tmp_path / "golden.json"
        golden.write_text(json.dumps([{"prompt": "What is 6 times 7?", "expected": "forty-two", "match": "exact"}]))
        before = len(stack.nodes(model="llama-3-8b"))
        made = stack.command(
            "revisions", "create", "llama-7b", "--arg", "--grammar", "--arg", ALWAYS, "--golden", str(golden), "--json"
        )
        assert made.returncode == 0, made.stderr
        revision = json.loads(made.stdout)["revision"]
        clients = Clients(stack, key)
        with clients.asking():
            done = roll_out(stack, revision, bake_s=2, longest_bake_s=4)
            assert done["status"] == "COMPLETED", done
            is_all_new = "forty-two" in stack.ask("What is 6 times 7?", key=key, model="llama-7b", max_tokens=8).text
            back = roll_out(stack, 1, bake_s=0, longest_bake_s=0)
        assert back["status"] == "COMPLETED", back
        assert is_all_new
        assert set(clients.answers) == {(200, True), (200, False)}, clients.answers
        answer = stack.ask("What is 6 times 7?", key=key, model="llama-7b", max_tokens=8)
        assert "forty-two" not in answer.text
        eventually(lambda: len(stack.nodes(model="llama-3-8b")) == before, within_s=30, what="as many nodes as before")

    def test_never_shows_clients_a_revision_that_answers_wrongly(self, stack: Stack, key: str, tmp_path: Path) -> None:
        golden = tmp_path / "golden.json"
        golden.write_text(json.dumps([{"prompt": "What is 6 times 7?", "expected": "42", "match": "exact"}]))
        made = stack.command(
            "revisions", "create", "llama-7b", "--arg", "--grammar", "--arg", ALWAYS, "--golden", str(golden), "--json"
        )
        clients = Clients(stack, key)
        with clients.asking():
            done = roll_out(stack, json.loads(made.stdout)["revision"], bake_s=0, longest_bake_s=0)
        assert done["status"] == "FAILED"
        assert "'forty-two' instead of '42'" in json.dumps(done)
        assert set(clients.answers) == {(200, False)}, clients.answers

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.stack import Stack, eventually, free_port


def start(stack: Stack, given: str | None, workflow_id: str) -> subprocess.CompletedProcess[str]:
    words = ["workflow", "start", "--type", "NodeProvisioning", "--task-queue", "fleet", "--workflow-id", workflow_id]
    return stack.temporal(*words, *(["--input", given] if given is not None else []))


def describe(stack: Stack, workflow_id: str) -> dict[str, Any]:
    described = stack.temporal("workflow", "describe", "--workflow-id", workflow_id, "-o", "json")
    assert described.returncode == 0, described.stderr
    return json.loads(described.stdout)


def status(stack: Stack, workflow_id: str) -> str:
    return str(describe(stack, workflow_id)["workflowExecutionInfo"]["status"]).removeprefix(
        "WORKFLOW_EXECUTION_STATUS_"
    )


def result(stack: Stack, workflow_id: str) -> dict[str, Any]:
    shown = stack.temporal("workflow", "result", "--workflow-id", workflow_id, "-o", "json")
    assert shown.returncode == 0, shown.stderr + shown.stdout
    return json.loads(shown.stdout)["result"]


class TestProvisioning:
    def test_a_node_started_from_the_temporal_cli_serves_and_is_drained(self, stack: Stack) -> None:
        started = start(stack, '{"model":"llama-7b","region":"eu-west"}', "by-hand/1")
        assert started.returncode == 0, started.stderr
        ready = result(stack, "by-hand/1")
        assert ready["state"] == "ready"
        answer = stack.ask_until_answered(within_s=5, model="llama-7b@eu-west;strict")
        assert answer.headers["x-crosslogic-node"] == ready["node_id"]

        described = describe(stack, f"node/{ready['node_id']}")
        assert described["workflowExecutionInfo"]["type"]["name"] == "NodeLifecycle"
        attributes = json.dumps(described["workflowExecutionInfo"]["searchAttributes"])
        assert "CrossLogicRegion" in attributes
        listed = stack.temporal("workflow", "list", "--query", f'CrossLogicNode="{ready["node_id"]}"', "-o", "json")
        assert f"node/{ready['node_id']}" in listed.stdout

        node = stack.command("nodes", "show", ready["node_id"], "--json")
        assert json.loads(node.stdout)["is_pinned"] is True
        drained = stack.command("nodes", "drain", ready["node_id"])
        assert drained.returncode == 0, drained.stderr
        ended = result(stack, f"node/{ready['node_id']}")
        assert ended["state"] == "terminated"
        assert stack.ask("hi", model="llama-7b@eu-west;strict", timeout_s=5).status_code == 503
        assert ready["node_id"] not in {node["id"] for node in stack.nodes(state="ready")}

    @pytest.mark.parametrize(
        ("given", "hint"),
        [
            ('{"region":"in-mumbai"}', "model"),
            ('{"model":"llama-7b","region":"in-mumbai","replicas":2}', "replicas"),
            ('{"model":7,"region":"in-mumbai"}', "model"),
            ('{"model":"gpt-17","region":"in-mumbai"}', "llama-3-8b"),
            ('{"model":"llama-7b","region":"atlantis"}', "in-mumbai"),
            ('"llama-7b"', "model"),
            ("[]", "model"),
            (None, "model"),
        ],
    )
    def test_bad_input_fails_at_once_and_says_what_to_write(self, stack: Stack, given: str | None, hint: str) -> None:
        workflow_id = f"bad/{time.monotonic_ns()}"
        assert start(stack, given, workflow_id).returncode == 0
        eventually(lambda: status(stack, workflow_id) == "FAILED", within_s=15, what="the workflow to fail")
        shown = stack.temporal("workflow", "show", "--workflow-id", workflow_id, "-o", "json")
        assert hint in shown.stdout


class TestJoin:
    @pytest.fixture
    def engine(self) -> Iterator[str]:
        """A node that exists already: an engine beside the stack, which no cloud of ours knows."""
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.plain_engine", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            eventually(lambda: socket.create_connection(("127.0.0.1", port), 1), within_s=20, what="the engine")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()

    def test_a_node_that_exists_already_joins_and_leaves(self, stack: Stack, engine: str) -> None:
        words = ("nodes", "join", "--model", "qwen-2.5-7b", "--region", "ap-southeast", "--endpoint", engine)
        joined = stack.command(*words)
        assert joined.returncode == 0, joined.stderr + joined.stdout
        found = re.search(r"node_[0-9a-z]{26}", joined.stdout)
        assert found
        answer = stack.ask_until_answered(within_s=20, model="qwen-2.5-7b")
        assert answer.headers["x-crosslogic-node"] == found[0]
        assert answer.headers["x-crosslogic-region"] == "ap-southeast"
        stack.command("nodes", "drain", found[0])
        eventually(
            lambda: found[0] not in {node["id"] for node in stack.nodes(state="ready")}, within_s=30, what="it to leave"
        )
        assert httpx.get(f"{engine}/health").status_code == 200, "a joined machine is not ours to end"

    def test_an_address_that_no_node_can_have_is_refused(self, stack: Stack) -> None:
        words = ("nodes", "join", "--model", "qwen-2.5-7b", "--region", "us-east", "--endpoint")
        refused = stack.command(*words, "http://169.254.169.254")
        assert refused.returncode == 1
        assert "endpoint" in refused.stderr + refused.stdout


class TestAdmin:
    def test_the_admin_api_is_documented(self, stack: Stack) -> None:
        paths = httpx.get(f"{stack.url}/openapi.json").json()["paths"]
        assert {"/v1/chat/completions", "/admin/keys", "/admin/nodes", "/admin/nodes/join"} <= set(paths)

    def test_it_wants_the_token(self, stack: Stack) -> None:
        assert httpx.get(f"{stack.url}/admin/nodes").status_code == 401
        answer = httpx.get(f"{stack.url}/admin/nodes", headers={"Authorization": "Bearer wrong"})
        assert answer.status_code in (401, 403)

    def test_the_audit_chain_holds(self, stack: Stack) -> None:
        stack.command("keys", "create", "--org", "demo", "--env", "dev")
        verified = stack.command("audit", "verify")
        assert verified.returncode == 0, verified.stdout

    def test_operations_endpoints(self, stack: Stack) -> None:
        assert httpx.get(f"{stack.url}/healthz").json() == {"status": "ok"}
        assert httpx.get(f"{stack.url}/readyz").status_code == 200
        page = httpx.get(f"{stack.url}/metrics").text
        assert "crosslogic_routable_nodes" in page

    def test_the_temporal_ui_is_there(self, stack: Stack) -> None:
        assert httpx.get(stack.endpoints["temporal_ui"]).status_code == 200

    def test_no_workflow_task_fails(self, stack: Stack) -> None:
        failing = stack.temporal(
            "workflow", "list", "--query", 'ExecutionStatus="Running"', "-o", "json", "--limit", "200"
        )
        for execution in json.loads(failing.stdout):
            described = describe(stack, execution["execution"]["workflowId"])
            attempt = described.get("pendingWorkflowTask", {}).get("attempt", 1)
            assert int(attempt) < 3, execution

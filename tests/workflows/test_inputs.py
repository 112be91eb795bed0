"""Whatever an operator sends with the real `temporal` command, a workflow starts or fails at once; none hangs (T6)."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any
from uuid import uuid4

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError

from crosslogic.contracts import names
from crosslogic.contracts.inputs import WORKFLOW_INPUTS
from crosslogic.contracts.strict import read
from crosslogic.dev import binaries
from crosslogic.domain.node import NodeState
from tests.workflows.fleet import FleetUnderTest
from worker import WORKFLOWS

AT_ONCE_S = 10.0


async def cli(fleet: FleetUnderTest, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        str(binaries.temporal()),
        *arguments,
        "--address",
        fleet.settings.temporal_address,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def start(fleet: FleetUnderTest, workflow: str, *arguments: str, workflow_id: str = "") -> str:
    workflow_id = workflow_id or f"cli-{uuid4()}"
    command = ("workflow", "start", "--type", workflow, "--task-queue", fleet.task_queue)
    code, output = await cli(fleet, *command, "--workflow-id", workflow_id, *arguments)
    assert code == 0, output
    return workflow_id


def given(value: Any) -> list[str]:
    return ["--input", json.dumps(value)]


def raw(data: bytes) -> RawValue:
    return RawValue(Payload(metadata={"encoding": b"json/plain"}, data=data))


GOOD = {"model": "llama-7b", "region": "in-mumbai"}

BAD: dict[str, tuple[list[str], str]] = {
    "no input": ([], "it was given no input"),
    "null": (given(None), "must be one JSON object with the fields of NodeProvisioningInput, not null"),
    "a list": (given([GOOD]), "not a list"),
    "text": (given("llama-7b"), "not 'llama-7b'"),
    "a number": (given(7), "not 7"),
    "two inputs": (given(GOOD) * 2, "it was given 2 inputs and takes one"),
    "an empty object": (given({}), "lacks 'model', 'region'"),
    "a missing field": (given({"model": "llama-7b"}), "lacks 'region'"),
    "an unknown field": (given(GOOD | {"regoin": "x"}), "no field 'regoin' (did you mean 'region'?)"),
    "another unknown field": (given(GOOD | {"zzz": 1}), "no field 'zzz' (it has model, region"),
    "text for a number": (given(GOOD | {"boot_timeout_s": "600"}), "boot_timeout_s must be a whole number, not '600'"),
    "a fraction for a number": (given(GOOD | {"boot_timeout_s": 1.5}), "boot_timeout_s must be a whole number"),
    "true for a number": (given(GOOD | {"boot_timeout_s": True}), "a whole number, not true"),
    "a number for text": (given(GOOD | {"model": 7}), "model must be text, not 7"),
    "null for text": (given(GOOD | {"region": None}), "region must be text, not null"),
    "text for a claim": (given(GOOD | {"spot": "yes"}), "spot must be true or false, not 'yes'"),
    "an object for text": (given(GOOD | {"gpu": {}}), "gpu must be text, not an object"),
    "plain bytes": ([*given(GOOD), "--input-meta", "encoding=binary/plain"], "encoded as 'binary/plain'"),
    "protobuf": ([*given(GOOD), "--input-meta", "encoding=json/protobuf"], "encoded as 'json/protobuf'"),
    "an unknown encoding": ([*given(GOOD), "--input-meta", "encoding=made/up"], "encoded as 'made/up'"),
    "an encoding of nothing": ([*given(GOOD), "--input-meta", "encoding=binary/null"], "not null"),
    "two inputs of no known encoding": (
        [*given(GOOD) * 2, "--input-meta", "encoding=made/up"],
        "it was given 2 inputs and takes one",
    ),
}


class TestBadInput:
    @pytest.mark.parametrize("what", BAD)
    async def test_fails_at_once_and_says_what_to_send(self, fleet: FleetUnderTest, what: str) -> None:
        arguments, words = BAD[what]
        workflow_id = await start(fleet, names.NODE_PROVISIONING, *arguments)
        with pytest.raises(WorkflowFailureError) as caught:
            async with asyncio.timeout(AT_ONCE_S):
                await fleet.client.get_workflow_handle(workflow_id).result()
        error = caught.value.cause
        assert isinstance(error, ApplicationError)
        assert error.type == "BadInput"
        assert error.non_retryable
        assert words in error.message
        assert '{"model": "llama-7b", "region": "in-mumbai"' in error.message
        assert await fleet.nodes.list_all() == []

    @pytest.mark.parametrize("data", [b"{}012", b"\xff\xfe\xfd", b"", b"\x00"])
    async def test_that_is_no_json_fails_too(self, fleet: FleetUnderTest, data: bytes) -> None:
        """The command refuses to send it; other clients would not."""
        handle: WorkflowHandle[Any, Any] = await fleet.client.start_workflow(
            names.NODE_PROVISIONING, raw(data), id=f"raw-{uuid4()}", task_queue=fleet.task_queue
        )
        with pytest.raises(WorkflowFailureError) as caught:
            async with asyncio.timeout(AT_ONCE_S):
                await handle.result()
        assert "its input is not JSON" in str(caught.value.cause)

    @pytest.mark.parametrize("workflow", WORKFLOW_INPUTS)
    async def test_fails_every_workflow(self, fleet: FleetUnderTest, workflow: str) -> None:
        for arguments in ([], given({"nonsense": 1}), given([])):
            workflow_id = await start(fleet, workflow, *arguments)
            with pytest.raises(WorkflowFailureError) as caught:
                async with asyncio.timeout(AT_ONCE_S):
                    await fleet.client.get_workflow_handle(workflow_id).result()
            assert WORKFLOW_INPUTS[workflow].example_json in str(caught.value.cause)

    async def test_of_a_lifecycle_is_its_id_too(self, fleet: FleetUnderTest) -> None:
        example = WORKFLOW_INPUTS[names.NODE_LIFECYCLE].example
        workflow_id = await start(fleet, names.NODE_LIFECYCLE, *given(example))
        with pytest.raises(WorkflowFailureError) as caught:
            await fleet.client.get_workflow_handle(workflow_id).result()
        assert f"must have the id 'node/{example['spec']['node_id']}'" in str(caught.value.cause)


class TestGoodInput:
    async def test_starts_a_node_that_serves(self, fleet: FleetUnderTest) -> None:
        workflow_id = await start(fleet, names.NODE_PROVISIONING, *given(GOOD))
        code, output = await cli(fleet, "workflow", "result", "--workflow-id", workflow_id, "-o", "json")
        assert code == 0, output
        assert json.loads(output)["result"]["state"] == "ready"
        await fleet.check_books()

    @pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda cls: cls.__name__)
    def test_is_in_the_docstring_of_its_workflow(self, workflow: type[Any]) -> None:
        block = re.search(r"```json\n(.*?)```", workflow.__doc__ or "", re.DOTALL)
        assert block is not None
        example = json.loads(block[1])
        known = WORKFLOW_INPUTS[workflow.__name__]
        assert example == known.example
        assert isinstance(read(known.type, example), known.type)


class TestSignals:
    """A payload that makes no sense never hurts a running workflow; the signal itself counts."""

    @pytest.mark.parametrize(
        "arguments",
        [
            given("maintenance"),
            given(None),
            given({"reason": "x"}),
            given([1, 2]),
            given("a") + given("b"),
            [*given("x"), "--input-meta", "encoding=made/up"],
            [],
        ],
        ids=["reason", "null", "object", "list", "two", "unknown encoding", "nothing"],
    )
    async def test_drain(self, fleet: FleetUnderTest, arguments: list[str]) -> None:
        node = await fleet.serve_one()
        workflow_id = names.node_workflow_id(node.node_id)
        await cli(fleet, "workflow", "signal", "--workflow-id", workflow_id, "--name", names.DRAIN, *arguments)
        async with asyncio.timeout(20):
            result = await fleet.lifecycle(node).result()
        expected = "maintenance" if arguments == given("maintenance") else None
        assert result["state"] == "terminated"
        assert expected is None or result["reason"] == expected
        await fleet.check_books()

    async def test_drain_with_what_is_no_json(self, fleet: FleetUnderTest) -> None:
        node = await fleet.serve_one()
        await fleet.lifecycle(node).signal(names.DRAIN, raw(b"{}012"))
        async with asyncio.timeout(20):
            assert (await fleet.lifecycle(node).result())["state"] == "terminated"

    async def test_look_again(self, fleet: FleetUnderTest) -> None:
        await fleet.add_deployment("llama-7b", in_mumbai=1)
        deployment = await fleet.keep_deployment("llama-7b")
        node = await fleet.until_state(NodeState.READY)
        for workflow_id in (deployment.id, names.node_workflow_id(node.node_id)):
            for arguments in (given({"x": 1}), given("a") + given("b")):
                await cli(
                    fleet, "workflow", "signal", "--workflow-id", workflow_id, "--name", names.LOOK_AGAIN, *arguments
                )
            await cli(fleet, "workflow", "signal", "--workflow-id", workflow_id, "--name", "made-up", *given(1))
            await fleet.client.get_workflow_handle(workflow_id).signal(names.LOOK_AGAIN, raw(b"{}012"))
        await fleet.lifecycle(node).signal(names.DRAIN)
        await fleet.until_state(NodeState.TERMINATED)
        # Both still do their work: the node has drained and is replaced.
        await fleet.until("a replacement", lambda: _is_replaced(fleet))
        described = await deployment.describe()
        assert described.status is WorkflowExecutionStatus.RUNNING


async def _is_replaced(fleet: FleetUnderTest) -> bool:
    return [node.state for node in await fleet.nodes.list_all()] == [NodeState.READY, NodeState.TERMINATED]

"""T1: every stored history replays on the workflows as they are now."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from crosslogic.clients import temporal
from crosslogic.contracts.inputs import WORKFLOW_INPUTS
from worker import WORKFLOWS

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))


def load(path: Path) -> tuple[WorkflowHistory, dict[str, Any]]:
    document = json.loads(path.read_text())
    workflow_id = document.pop("workflowId")
    return WorkflowHistory.from_json(workflow_id, document), document


def type_of(document: dict[str, Any]) -> str:
    return document["events"][0]["workflowExecutionStartedEventAttributes"]["workflowType"]["name"]


def replayer() -> Replayer:
    return Replayer(
        workflows=WORKFLOWS,
        workflow_runner=temporal.workflow_runner(),
        data_converter=temporal.DATA_CONVERTER,
        interceptors=temporal.interceptors(),
    )


class TestHistories:
    @pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
    async def test_replay(self, path: Path) -> None:
        history, _ = load(path)
        await replayer().replay_workflow(history)

    def test_are_there_for_every_workflow_and_name_no_machine(self) -> None:
        types = Counter(type_of(load(path)[1]) for path in HISTORIES)
        assert set(types) == set(WORKFLOW_INPUTS)
        assert types["NodeProvisioning"] >= 5
        assert types["NodeLifecycle"] >= 5
        for path in HISTORIES:
            text = path.read_text()
            assert '"identity": "worker"' in text
            assert ".py" not in text
            assert "@" not in text

    @pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
    async def test_would_notice_another_order(self, path: Path) -> None:
        """The check can fail: a history in which another activity was scheduled is refused."""
        _, document = load(path)
        scheduled = [
            event["activityTaskScheduledEventAttributes"]
            for event in document["events"]
            if "activityTaskScheduledEventAttributes" in event
        ]
        scheduled[-1]["activityType"]["name"] = "something_else"
        with pytest.raises(NondeterminismError):
            await replayer().replay_workflow(WorkflowHistory.from_json("anything", document))

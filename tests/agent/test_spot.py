"""Each cloud's notice, from metadata servers that behave as the providers' documentation says."""

from __future__ import annotations

import threading
import time
from email.utils import formatdate

import pytest

from crosslogic.agent.spot import Away, Aws, Azure, Gcp, Notice, Watcher
from tests.agent.metadata import Metadata


class TestAws:
    def test_says_nothing_and_then_what_is_taken_and_when(self, metadata: Metadata) -> None:
        watcher = Aws(metadata.url)
        watcher.check()
        assert watcher.poll() is None
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
        metadata.aws_action = {"action": "terminate", "time": at}
        notice = watcher.poll()
        assert notice is not None
        assert (notice.text, notice.is_final) == ("aws: terminate", True)
        assert notice.left_s == pytest.approx(119, abs=5)

    def test_gets_a_new_token_when_the_old_one_is_refused(self, metadata: Metadata) -> None:
        watcher = Aws(metadata.url)
        watcher.check()
        metadata.aws_valid_token = "another"
        metadata.aws_action = {"action": "stop"}
        assert watcher.poll() == Notice("aws: stop", None)
        assert metadata.aws_tokens == 2

    def test_a_recommendation_is_not_final(self, metadata: Metadata) -> None:
        watcher = Aws(metadata.url)
        watcher.check()
        metadata.aws_rebalance = {"noticeTime": "2026-11-24T00:00:00Z"}
        assert watcher.poll() == Notice("aws: rebalance", None, is_final=False)


class TestGcp:
    def test_hears_of_it_while_it_waits(self, metadata: Metadata) -> None:
        watcher = Gcp(metadata.host)
        watcher.check()
        assert watcher.poll() is None
        found: list[Notice | None] = []
        waiting = threading.Thread(target=lambda: found.append(watcher.poll()))
        waiting.start()
        assert metadata.waiting.wait(10)
        metadata.preempt()
        waiting.join(10)
        assert found == [Notice("gcp: preempted", 30.0)]

    def test_misses_nothing_between_two_questions(self, metadata: Metadata) -> None:
        watcher = Gcp(metadata.host)
        watcher.poll()
        metadata.preempt()
        assert watcher.poll() == Notice("gcp: preempted", 30.0)


class TestAzure:
    def test_hears_of_its_own_preemption_only(self, metadata: Metadata) -> None:
        watcher = Azure(metadata.url)
        watcher.check()
        at = formatdate(time.time() + 30, usegmt=True)
        metadata.azure_events = [
            {"EventType": "Reboot", "Resources": [metadata.machine], "NotBefore": at},
            {"EventType": "Preempt", "Resources": ["another"], "NotBefore": at},
        ]
        assert watcher.poll() is None
        metadata.azure_events += [{"EventType": "Preempt", "Resources": ["x", metadata.machine], "NotBefore": at}]
        notice = watcher.poll()
        assert notice is not None
        assert notice.text == "azure: preempt"
        assert notice.left_s == pytest.approx(29, abs=5)

    def test_an_event_that_has_started_has_no_time(self, metadata: Metadata) -> None:
        watcher = Azure(metadata.url)
        watcher.check()
        metadata.azure_events = [{"EventType": "Preempt", "Resources": [metadata.machine], "NotBefore": ""}]
        assert watcher.poll() == Notice("azure: preempt", None)


class TestAway:
    @pytest.mark.parametrize(
        "watcher",
        [Aws("http://127.0.0.1:1"), Gcp("127.0.0.1:1"), Azure("http://127.0.0.1:1")],
        ids=lambda one: one.name,
    )
    def test_a_machine_without_metadata_server_is_no_clouds(self, watcher: Watcher) -> None:
        with pytest.raises(Away):
            watcher.check()

"""One round, every minute: seal the hours that are over, rate and prove them, and tell who spends too much."""

from __future__ import annotations

from datetime import datetime

from temporalio import workflow

from activities.ledger import LedgerActivities
from activities.notifications import NotificationActivities
from crosslogic.contracts.ledger import UsageSealingInput
from crosslogic.contracts.names import USAGE_SEALING
from workflows.steps import QUICK, Story, check_cancelled, endless, is_history_long

# Summing the records of an hour again reads all of them.
PROOF_S = 300.0
SEALING_S = 120.0
SENDING_S = 600.0


@workflow.defn(name=USAGE_SEALING)
class UsageSealing:
    """Seal and rate what can be.

    A schedule starts it every minute; by hand it does the same:

    ```json
    {"orgs_at_once": 200}
    ```
    """

    @workflow.run
    async def run(self, input: UsageSealingInput) -> str:
        """What was done, in a sentence."""
        story = Story("Sealing usage")
        await workflow.execute_activity_method(
            LedgerActivities.add_usage_partitions, **QUICK, summary="Make the partitions of the months to come"
        )
        sealed = await workflow.execute_activity_method(
            LedgerActivities.seal_hours, **endless(SEALING_S), summary="Seal what can be"
        )
        done = f"sealed until {_shown(sealed.end)}"
        if sealed.waits_for:
            done += f"; the next hour waits for {sealed.waits_for}"
        story.tell(done)
        hours = 0
        while not is_history_long():
            check_cancelled()
            rated = await workflow.execute_activity_method(
                LedgerActivities.rate_hours, input.orgs_at_once, **QUICK, summary="Rate the oldest hour"
            )
            if not rated.count:
                break
            hours += rated.count
            story.tell(f"{done}; {hours} hours of orgs rated, the latest of {_shown(rated.hour)}")
        while not is_history_long():
            check_cancelled()
            proved = await workflow.execute_activity_method(
                LedgerActivities.prove_hours, **endless(PROOF_S), summary="Sum the records again"
            )
            if proved.start == proved.end:
                break
        alerts = await workflow.execute_activity_method(
            NotificationActivities.find_alerts, **QUICK, summary="Look for caps and norms that are exceeded"
        )
        await workflow.execute_activity_method(
            NotificationActivities.send_notifications, **endless(SENDING_S), summary="Send what is due"
        )
        told = f"{done}; {hours} hours of orgs rated, {alerts} new alerts"
        story.tell(told)
        return told


def _shown(instant: str) -> str:
    return f"{datetime.fromisoformat(instant):%Y-%m-%d %H:%M}"

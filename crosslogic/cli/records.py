"""What was done: single requests and the audit log."""

from __future__ import annotations

from typing import Annotated

import typer

from crosslogic.cli.session import Session, command, fail
from crosslogic.cli.tenancy import Most

audit = typer.Typer(no_args_is_help=True)
requests = typer.Typer(no_args_is_help=True)


@command(requests, "show")
def show_request(
    session: Session,
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="The answer's x-request-id.")],
) -> None:
    """Show what one request used, and why it went where it went."""
    session.show(session.get(f"/requests/{request_id}"))


@command(audit, "list")
def list_entries(
    session: Session,
    subject: Annotated[str | None, typer.Option(help="Only what was done to this id or name.")] = None,
    limit: Most = 50,
) -> None:
    """List what was changed, newest first."""
    rows = session.get_all("/audit", limit, subject=subject)
    session.show_table(rows, ("seq", "at", "actor", "action", "subject", "details"), "Nothing was changed yet.")


@command(audit, "verify")
def verify(
    session: Session,
    head: Annotated[str | None, typer.Option(help="A head printed earlier, which must be in the log.")] = None,
) -> None:
    """Prove that no record was altered or removed; exit code 1 if one was."""
    verdict = session.get("/audit/verify", head=head)
    session.say(
        verdict,
        f"The audit log is intact: {verdict['records']} records, head {verdict['head']}"
        if verdict["is_intact"]
        else f"The audit log is NOT intact after record {verdict['records']}.",
    )
    if not verdict["is_intact"]:
        fail(f"{verdict['problem']}. Compare the table audit_log with a backup from before.")

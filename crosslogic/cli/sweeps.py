"""Sweeps of the clouds."""

from __future__ import annotations

from typing import Annotated

import typer

from crosslogic.cli.session import Session, command
from crosslogic.cli.tenancy import Most

app = typer.Typer(no_args_is_help=True)

COLUMNS = (
    "id",
    "started_at",
    "machines",
    "owned",
    "ending",
    "destroyed",
    "foreign",
    "unexplained",
    "missing",
    "unasked",
)
FINDING = ("sweep", "cluster", "standing", "reason", "outcome")


@command(app, "list")
def list_sweeps(
    session: Session,
    with_findings: Annotated[bool, typer.Option("--findings", help="Only what was found, one line each.")] = False,
    limit: Most = 20,
) -> None:
    """List sweeps, newest first."""
    rows = session.get_all("/sweeps", limit, with_findings=with_findings or None)
    if with_findings and not session.is_json:
        found = [{**finding, "sweep": row["id"]} for row in rows for finding in row["findings"]]
        session.show_table(found, FINDING, "No sweep has found anything.")
    else:
        session.show_table(rows, COLUMNS, "There was no sweep yet.")


@command(app, "run")
def run_sweep(
    session: Session,
    provider: Annotated[str, typer.Option(help="Left out: every cloud that is connected.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only look and report.")] = False,
    end_all_unintended: Annotated[
        bool, typer.Option("--end-all-unintended", help="End unintended machines however many there are.")
    ] = False,
) -> None:
    """Sweep now."""
    body = {"provider": provider, "dry_run": dry_run, "end_all_unintended": end_all_unintended}
    session.show(
        session.send("POST", "/sweeps", body), note="It takes up to a minute. See what it found with: sweeps list"
    )

"""Reservations."""

from __future__ import annotations

from typing import Annotated

import typer

from crosslogic.cli.session import Session, command
from crosslogic.cli.tenancy import Most, OptionalOrg, Org

app = typer.Typer(no_args_is_help=True)

COLUMNS = ("id", "org_id", "model", "region", "capacity_units", "starts_at", "ends_at", "overage")

Ending = Annotated[str | None, typer.Option("--at", help="Such as 2027-01-01T00:00:00Z. Left out: the next full hour.")]


@command(app, "add")
def add_reservation(
    session: Session,
    org: Org,
    model: Annotated[str, typer.Option(help="A model's name or alias.")],
    region: Annotated[str, typer.Option(help="A region's name or cloud alias.")],
    units: Annotated[int, typer.Option(help="Capacity units: tokens a second.", min=1)],
    starts_at: Annotated[str | None, typer.Option(help="A full hour (UTC). Left out: the next one.")] = None,
    ends_at: Annotated[str | None, typer.Option(help="A full hour (UTC). Left out: until it is ended.")] = None,
    overage: Annotated[bool, typer.Option(help="Are tokens beyond it served as serverless ones?")] = True,
    reservation_id: Annotated[
        str | None, typer.Option(help="An id of your own, to be able to repeat the command.")
    ] = None,
) -> None:
    """Reserve capacity for an org."""
    body = {
        "org": org,
        "model": model,
        "region": region,
        "capacity_units": units,
        "starts_at": starts_at,
        "ends_at": ends_at,
        "overage": overage,
        "reservation_id": reservation_id,
    }
    session.show(session.send("POST", "/reservations", body))


@command(app, "list")
def list_reservations(
    session: Session,
    org: OptionalOrg = None,
    with_ended: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
    limit: Most = 100,
) -> None:
    """List reservations."""
    rows = session.get_all("/reservations", limit, org=org, include_ended=with_ended or None)
    session.show_table(rows, COLUMNS, "There are no such reservations.")


@command(app, "end")
def end_reservation(
    session: Session, reservation_id: Annotated[str, typer.Argument(metavar="RESERVATION_ID")], at: Ending = None
) -> None:
    """End a reservation, or set when it will."""
    made = session.send("PATCH", f"/reservations/{reservation_id}", {"ends_at": at})
    session.say(made, f"Reservation {made['id']} ends at {made['ends_at']}.")

"""Billing: months as they stand, price books, credits and the ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from crosslogic.cli import stripe_setup
from crosslogic.cli.session import Session, command, fail

app = typer.Typer(no_args_is_help=True)
app.command("setup")(stripe_setup.setup)

LINE_COLUMNS = ("model", "region", "token_class", "tier", "tokens", "free_tokens", "amount")
BOOK_COLUMNS = ("name", "prices", "tiers", "free_tokens", "holds_from")
CREDIT_COLUMNS = ("id", "kind", "cents", "granted_at", "expires_at")
BALANCE_COLUMNS = ("org_id", "account", "unit", "amount")

OrgArgument = Annotated[str, typer.Argument(metavar="ORG", help="The org's name or id.")]
MonthArgument = Annotated[str, typer.Argument(metavar="MONTH", help="Such as 2026-11.")]
FromHour = Annotated[str | None, typer.Option("--at", help="A full hour (UTC). Left out: the next one.")]


@command(app, "preview")
def preview(session: Session, org: OrgArgument, month: MonthArgument) -> None:
    """Show what a month costs as it stands; nothing is written."""
    _show(session, session.get(f"/billing/{org}/{month}"))


@command(app, "what-if")
def what_if(
    session: Session,
    org: OrgArgument,
    month: MonthArgument,
    price_book: Annotated[str, typer.Option(help="As if this book had held all month.")],
) -> None:
    """Show what a month would have cost by another price book; nothing is written."""
    _show(session, session.get(f"/billing/{org}/{month}", price_book=price_book))


@command(app, "price-books")
def list_price_books(session: Session) -> None:
    """List price books, and from when on each holds."""
    books = session.get("/price-books")
    if session.is_json:
        session.show(books)
        return
    rows = [
        {
            "name": book["name"],
            "prices": len(book["prices"]),
            "tiers": [f"−{tier['discount_percent']} % above {tier['above_tokens']}" for tier in book["tiers"]],
            "free_tokens": book["free_tokens"],
            "holds_from": [start["starts_at"] for start in books["starts"] if start["price_book"] == book["name"]],
        }
        for book in books["data"]
    ]
    session.show_table(rows, BOOK_COLUMNS, "There is none. Run: setup")


@command(app, "add-price-book")
def add_price_book(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON, as `billing price-books --json` shows a book.")],
) -> None:
    """Add a version of our prices; until it starts it answers what-if questions only."""
    try:
        book: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        fail(f"{file} cannot be read ({error}).")
    made = session.send("POST", "/price-books", book)
    session.say(made, f"Price book {made['name']} is there; start it with: billing start-price-book {made['name']}")


@command(app, "start-price-book")
def start_price_book(
    session: Session, name: Annotated[str, typer.Argument(metavar="NAME")], at: FromHour = None
) -> None:
    """Let a price book hold from a full hour on."""
    made = session.send("POST", f"/price-books/{name}/start", {"starts_at": at})
    session.say(made, f"Price book {name} holds from {made['starts_at']} on.")


@command(app, "credits")
def list_credits(session: Session, org: OrgArgument) -> None:
    """Show an org's wallet: what is left of each credit."""
    wallet = session.get(f"/orgs/{org}/credits")
    if session.is_json:
        session.show(wallet)
    else:
        session.show_table(wallet["data"], CREDIT_COLUMNS, f"{org} has no credits.")


@command(app, "grant-credit")
def grant_credit(
    session: Session,
    org: OrgArgument,
    cents: Annotated[int, typer.Argument(metavar="CENTS", min=1)],
    reason: Annotated[str, typer.Option(help="What it is for; the same reason is granted once.")],
    kind: Annotated[str, typer.Option(help="promotional or paid.")] = "promotional",
    expires_at: Annotated[str | None, typer.Option(help="It pays usage of hours that end by then.")] = None,
) -> None:
    """Grant an org a credit."""
    body = {"kind": kind, "cents": cents, "reason": reason, "expires_at": expires_at}
    wallet = session.send("POST", f"/orgs/{org}/credits", body)
    session.say(wallet, f"{org} has {_usd(wallet['cents'] * 10_000)} of credits.")


@command(app, "ledger")
def show_ledger(
    session: Session,
    org: Annotated[str | None, typer.Option(help="This org's accounts. Left out: our own.")] = None,
) -> None:
    """Show the ledger's balances, and how far usage is sealed and rated."""
    ledger = session.get("/ledger", org=org)
    if session.is_json:
        session.show(ledger)
        return
    session.show_table(ledger["data"], BALANCE_COLUMNS, "There are no accounts.")
    print(f"Sealed until {ledger['sealed_until']}, rated until {ledger['rated_until']}.")


def _show(session: Session, statement: dict[str, Any]) -> None:
    if session.is_json:
        session.show(statement)
        return
    rows = [
        {**line, "tier": f"−{line['discount_percent']} %", "amount": _usd(line["microdollars"])}
        for line in statement["lines"]
    ]
    session.show_table(rows, LINE_COLUMNS, "Nothing was used.")
    for fee in statement["fees"]:
        units = f"{fee['capacity_units']} CU of {fee['model']} in {fee['region']}"
        print(f"Reservation {fee['reservation_id']}, {units}, {fee['hours']} h: {_usd(fee['microdollars'])}")
    state = "final" if statement["is_final"] else "as it stands"
    print(f"Usage {_usd(statement['usage_microdollars'])}, fees {_usd(statement['fee_microdollars'])}", end="")
    print(
        f", credits {_usd(statement['credit_cents'] * 10_000)}: {_usd(statement['due_cents'] * 10_000)} due ({state})"
    )


def _usd(microdollars: int) -> str:
    sign = "−" if microdollars < 0 else ""
    return f"{sign}${abs(microdollars) // 1_000_000}.{abs(microdollars) % 1_000_000:06d}"

"""Usage: summed for people, and as files that go from one installation to another."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from crosslogic.cli.session import Session, command, default, fail
from crosslogic.cli.tenancy import OptionalOrg

app = typer.Typer()

SUMS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
DIMENSIONS = ("day", "org", "environment", "model")
LOG_COLUMNS = ("name", "complete_until", "reported_at")
RECORDS_AT_ONCE = 1_000


@default(app)
def show_usage(
    session: Session,
    by: Annotated[list[str] | None, typer.Option(help="org, environment, model or day; repeat it.")] = None,
    org: OptionalOrg = None,
    start: Annotated[
        str | None, typer.Option(help="Such as 2026-11-01T00:00:00Z. Left out: this month's start.")
    ] = None,
    end: Annotated[str | None, typer.Option(help="Not included. Left out: now.")] = None,
) -> None:
    """Sum requests and tokens; by org, environment and model if nothing is said."""
    asked = by or ["org", "environment", "model"]
    usage = session.get("/usage", by=asked, org=org, start=start, end=end)
    if session.is_json:
        session.show(usage)
    else:
        columns = (*(name for name in DIMENSIONS if name in asked), *SUMS)
        session.show_table(usage["data"], columns, f"Nothing was used from {usage['start']} to {usage['end']}.")


@command(app, "import")
def import_usage(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, or CSV with a header line (*.csv).")],
) -> None:
    """Take usage from a file; doing it again changes nothing. A manifest beside the file is checked first."""
    manifest = _manifest_of(file)
    if manifest.exists():
        expected = json.loads(manifest.read_text())
        if expected["sha256"] != _digest(file):
            fail(f"{file} is not the file that {manifest.name} describes. Export it again, or remove the manifest.")
    new = known = 0
    for batch in _batches(_lines(file)):
        try:
            done = session.send("POST", "/usage/import", {"records": batch})
        except SystemExit:
            fail(f"{new + known} records are in, what follows is not; mend the file and import it again.")
        new, known = new + done["new"], known + done["known"]
    session.say({"new": new, "known": known}, f"{new} records are new, {known} were there already.")


@command(app, "export")
def export_usage(
    session: Session,
    start: Annotated[str, typer.Option(help="Such as 2026-11-01T00:00:00Z.")],
    end: Annotated[str, typer.Option(help="Not included.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Written anew, with FILE.manifest.json beside it.")],
    org: OptionalOrg = None,
) -> None:
    """Write usage records as JSONL, with a manifest: how many, how many tokens, and the file's SHA-256."""
    sums = dict.fromkeys(("records", "prompt_tokens", "completion_tokens"), 0)
    after: str | None = None
    temporary = out.with_name(f"{out.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        while True:
            page = session.get("/usage/records", start=start, end=end, org=org, after=after, limit=RECORDS_AT_ONCE)
            for line in page["data"]:
                file.write(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n")
                sums["records"] += 1
                sums["prompt_tokens"] += line["prompt_tokens"]
                sums["completion_tokens"] += line["completion_tokens"]
            after = page["next_after"]
            if after is None:
                break
    manifest = {"file": out.name, "start": start, "end": end, "org": org, **sums, "sha256": _digest(temporary)}
    temporary.replace(out)
    _manifest_of(out).write_text(json.dumps(manifest, indent=2) + "\n")
    session.say(manifest, f"{sums['records']} records are in {out}.")


@command(app, "logs")
def list_logs(session: Session) -> None:
    """List the API processes' logs of usage: hours are sealed up to the first."""
    session.show_table(session.get("/usage/logs")["data"], LOG_COLUMNS, "No API process has reported.")


@command(app, "forget-log")
def forget_log(session: Session, name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Give up a log that nobody will ever read, so that hours are sealed without it."""
    session.show_table(session.send("POST", f"/usage/logs/{name}/forget", {})["data"], LOG_COLUMNS, "No log is left.")


def _manifest_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.manifest.json")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            if file.suffix.lower() == ".csv":
                yield from csv.DictReader(opened)
                return
            for number, text in enumerate(opened, 1):
                if text.strip():
                    try:
                        yield json.loads(text)
                    except ValueError as error:
                        fail(f"line {number} of {file} is not JSON ({error}). Earlier lines are in.")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file} cannot be read ({error}).")


def _batches(lines: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for line in lines:
        batch.append(line)
        if len(batch) == RECORDS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch

"""Models, regions and deployments."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any
from urllib.parse import quote

import typer

from crosslogic.cli.session import Session, command

deployments = typer.Typer(no_args_is_help=True)
deadlines = typer.Typer(no_args_is_help=True)

MODEL_COLUMNS = ("name", "aliases", "kind", "context_tokens", "input", "output")
REGION_COLUMNS = ("name", "title", "multiplier", "aliases", "fallback")
DEADLINES = ("connect_timeout_ms", "first_token_timeout_ms", "idle_timeout_ms", "total_timeout_ms")
DECISION_COLUMNS = ("at", "region", "desired", "present", "serving", "reason")
DEPLOYMENT_COLUMNS = ("name", "model", "strategy", "replicas")

_TARGET = re.compile(r"([^=]+)=(\d{1,4})(?:\.\.(\d{1,4}))?")


def register(app: typer.Typer) -> None:
    """Add the commands that have no group."""
    command(app, "models")(list_models)
    command(app, "regions")(list_regions)


def list_models(session: Session) -> None:
    """List models with their list prices (USD per 1M tokens)."""
    rows = session.get("/models")["data"]
    if not session.is_json:
        rows = [
            {**row, "input": _price(row["input_price_e10"]), "output": _price(row["output_price_e10"])} for row in rows
        ]
    session.show_table(rows, MODEL_COLUMNS, "There are no models. Run: setup")


def list_regions(session: Session) -> None:
    """List regions."""
    rows = session.get("/regions")["data"]
    if not session.is_json:
        rows = [{**row, "multiplier": f"{row['multiplier_bp'] / 10_000:g}×"} for row in rows]
    session.show_table(rows, REGION_COLUMNS, "There are no regions. Run: setup")


DeadlineOption = Annotated[str | None, typer.Option(metavar="MS|default")]


@command(deadlines, "list")
def list_deadlines(session: Session) -> None:
    """List every model's own deadlines; the API's settings hold where there is none."""
    rows = [{"name": row["name"], **row["deadlines"]} for row in session.get("/models")["data"]]
    session.show_table(rows, ("name", *DEADLINES), "There are no models. Run: setup")


@command(deadlines, "set")
def set_deadlines(
    session: Session,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or alias.")],
    connect_timeout_ms: DeadlineOption = None,
    first_token_timeout_ms: DeadlineOption = None,
    idle_timeout_ms: DeadlineOption = None,
    total_timeout_ms: DeadlineOption = None,
) -> None:
    """Set some of a model's deadlines and keep the others; acts everywhere within 1 s."""
    given = zip(DEADLINES, (connect_timeout_ms, first_token_timeout_ms, idle_timeout_ms, total_timeout_ms), strict=True)
    changes = {name: _deadline(name, value) for name, value in given if value is not None}
    if not changes:
        raise typer.BadParameter("give at least one deadline, such as --first-token-timeout-ms 5000")
    made = session.send("PATCH", f"/models/{model}", changes)
    session.show(made if session.is_json else {"name": made["name"], **made["deadlines"]})


def _deadline(name: str, value: str) -> int | None:
    if value == "default":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise typer.BadParameter("write milliseconds, or default", param_hint=f"--{name.replace('_', '-')}")
    return int(value)


@command(deployments, "list")
def list_deployments(session: Session) -> None:
    """List deployments."""
    rows = session.get("/deployments")["data"]
    session.show_table(rows if session.is_json else [_row(row) for row in rows], DEPLOYMENT_COLUMNS, "There are none.")


@command(deployments, "set")
def set_deployment(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    region: Annotated[
        list[str] | None,
        typer.Option(metavar="REGION=MIN[..MAX]", help="Replicas of a region; repeat it. Others stay as they are."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Needed for a new deployment.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="round-robin, least-load, latency-weighted, cost-weighted or prefix-affinity."),
    ] = None,
    placement: Annotated[str | None, typer.Option(help="spread (over zones) or packed.")] = None,
    on_demand_base: Annotated[
        int | None, typer.Option(min=0, max=1000, help="So many replicas of each region are not spot machines.")
    ] = None,
    ttft_target_ms: Annotated[
        str | None, typer.Option(metavar="MS|none", help="What 99 % of the streams' first tokens keep.")
    ] = None,
    spend_cap_usd_per_h: Annotated[
        str | None, typer.Option(metavar="USD|none", help="All its machines together cost no more.")
    ] = None,
    idle_s: Annotated[
        int | None,
        typer.Option(min=1, max=86_400, help="Where MIN is 0: without a request for so long, no node is kept."),
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option(help="Repeat it, best first: one that cannot be had gives way to the next.")
    ] = None,
) -> None:
    """Create a deployment, or change how many replicas it has in a region and how it grows; the rest stays."""
    known: dict[str, Any] | None = next(
        (row for row in session.get("/deployments")["data"] if row["name"] == name), None
    )
    if known is None and model is None:
        raise typer.BadParameter(f"there is no deployment {name} yet; say which model it serves", param_hint="--model")
    targets: dict[str, dict[str, Any]] = {target["region"]: target for target in known["regions"]} if known else {}
    names = {alias: row["name"] for row in session.get("/regions")["data"] for alias in (*row["aliases"], row["name"])}
    for text in region or []:
        target = _target(text)
        # An alias must not become a second target of the same region.
        target["region"] = names.get(target["region"], target["region"])
        targets[target["region"]] = target
    body = {
        "model": model or (known["model"] if known else None),
        "strategy": strategy,
        "regions": list(targets.values()),
    }
    scaling: dict[str, Any] = {"placement": placement, "on_demand_base": on_demand_base, "idle_s": idle_s, "gpus": gpu}
    scaling = {name: value for name, value in scaling.items() if value is not None}
    if ttft_target_ms is not None:
        scaling["ttft_target_ms"] = _whole_or_none(ttft_target_ms, "--ttft-target-ms")
    if spend_cap_usd_per_h is not None:
        scaling["spend_cap_microdollars_per_h"] = _microdollars_or_none(spend_cap_usd_per_h)
    if scaling:
        body["scaling"] = scaling
    made = session.send("PUT", f"/deployments/{name}", body)
    told = "" if made["is_workflow_told"] else "Temporal is away: this takes effect when it is back."
    session.show(made if session.is_json else _row(made), note=told)


@command(deployments, "decisions")
def list_decisions(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    region: Annotated[str | None, typer.Option(help="Only this region's.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
) -> None:
    """Show what the autoscaler decided lately, and why."""
    query = f"?limit={limit}" + (f"&region={quote(region)}" if region else "")
    rows = session.get(f"/deployments/{name}/scaling{query}")["data"]
    session.show_table(rows, DECISION_COLUMNS, "It has decided nothing yet.")


def _whole_or_none(text: str, option: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter("write a whole number, or none", param_hint=option)
    return int(text)


def _microdollars_or_none(text: str) -> int | None:
    if text == "none":
        return None
    try:
        amount = Decimal(text) * 1_000_000
        if not 0 <= amount <= 10**12 or amount != int(amount):
            raise ValueError
    except (ArithmeticError, ValueError):
        raise typer.BadParameter("write US dollars such as 4.50, or none", param_hint="--spend-cap-usd-per-h") from None
    return int(amount)


def _target(text: str) -> dict[str, Any]:
    found = _TARGET.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r}: write REGION=MIN or REGION=MIN..MAX", param_hint="--region")
    least, most = int(found[2]), int(found[3] or found[2])
    return {"region": found[1], "replicas_min": least, "replicas_max": most}


def _row(deployment: dict[str, Any]) -> dict[str, Any]:
    replicas = [
        f"{target['region']}={target['replicas_min']}"
        + (f"..{target['replicas_max']}" if target["replicas_max"] != target["replicas_min"] else "")
        for target in deployment["regions"]
    ]
    return {
        "name": deployment["name"],
        "model": deployment["model"],
        "strategy": deployment["strategy"],
        "replicas": replicas,
    }


def _price(price_e10: int | None) -> str | None:
    """USD per 1M tokens of a price in 10⁻¹⁰ USD a token."""
    return None if price_e10 is None else f"{price_e10 // 10_000}.{price_e10 % 10_000:04d}"

"""Nodes."""

from __future__ import annotations

from typing import Annotated

import typer

from crosslogic.cli.session import Session, command
from crosslogic.cli.tenancy import Most

app = typer.Typer(no_args_is_help=True)

COLUMNS = ("id", "state", "model", "region", "deployment", "provider", "is_pinned", "reason", "changed_at")

Model = Annotated[str, typer.Option("--model", help="A model's name or alias.")]
Region = Annotated[str, typer.Option("--region", help="A region's name or cloud alias.")]
HAZARD_COLUMNS = ("cloud", "zone", "gpu", "preemptions_per_h", "preemptions", "exposure_h")

NodeId = Annotated[str, typer.Argument(metavar="NODE_ID")]


@command(app, "list")
def list_nodes(
    session: Session,
    in_state: Annotated[list[str] | None, typer.Option(help="Only such nodes: ready, draining, …; repeat it.")] = None,
    region: Annotated[str | None, typer.Option(help="Only there.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    with_ended: Annotated[bool, typer.Option("--all", help="Nodes that have ended, too.")] = False,
    limit: Most = 100,
) -> None:
    """List nodes, newest first."""
    rows = session.get_all(
        "/nodes", limit, state=in_state or None, region=region, model=model, include_ended=with_ended or None
    )
    session.show_table(rows, COLUMNS, "There are no such nodes.")


@command(app, "show")
def show_node(session: Session, node_id: NodeId) -> None:
    """Show all of one node."""
    session.show(session.get(f"/nodes/{node_id}"))


@command(app, "hazards")
def list_hazards(
    session: Session, days: Annotated[int, typer.Option(min=1, max=365, help="The window to learn from.")] = 30
) -> None:
    """Show where spot machines live long, and where not, the safest place first."""
    rows = session.get("/nodes/hazards", days=days)["data"]
    session.show_table(rows, HAZARD_COLUMNS, "No spot machine has served yet.")


@command(app, "start")
def start_node(
    session: Session,
    model: Model,
    region: Region,
    gpu: Annotated[str, typer.Option(help="Left out: the cheapest that fits.")] = "",
    spot: Annotated[bool, typer.Option("--spot/--on-demand", help="May the cloud take it back?")] = True,
    node_id: Annotated[str | None, typer.Option(help="An id of your own, to be able to repeat the command.")] = None,
) -> None:
    """Start a node in the cloud."""
    body = {"model": model, "region": region, "gpu": gpu, "spot": spot, "node_id": node_id}
    session.show(
        session.send("POST", "/nodes", body), note="It is on its way. Watch it with: nodes list, or in the Temporal UI."
    )


@command(app, "join")
def join_node(
    session: Session,
    model: Model,
    region: Region,
    endpoint: Annotated[str, typer.Option(help="Base URL of its engine, such as https://gpu-7.example.org:8443.")],
    node_id: Annotated[str | None, typer.Option(help="An id of your own, to be able to repeat the command.")] = None,
) -> None:
    """Put an engine that runs already into service."""
    body = {"model": model, "region": region, "endpoint": endpoint, "node_id": node_id}
    session.show(
        session.send("POST", "/nodes/join", body),
        note="It is admitted once its engine answers, asked with the credential as its API key.",
    )


@command(app, "price")
def price_node(
    session: Session,
    node_id: NodeId,
    microdollars_per_h: Annotated[int, typer.Argument(metavar="MICRODOLLARS_PER_H", min=0, help="0: unknown.")],
) -> None:
    """Say what a node costs by the hour: `cost-weighted` deployments fill cheaper ones first."""
    node = session.send("PATCH", f"/nodes/{node_id}", {"price_microdollars_per_h": microdollars_per_h})
    session.say(node, f"Node {node_id} costs ${microdollars_per_h / 1_000_000:g} an hour.")


@command(app, "drain")
def drain_node(
    session: Session,
    node_id: NodeId,
    reason: Annotated[str, typer.Option(help="Shown with the node and in the audit log.")] = "drained by an operator",
) -> None:
    """Take a node out of service; running requests end first."""
    node = session.send("POST", f"/nodes/{node_id}/drain", {"reason": reason})
    ended = node["ended_at"] is not None
    session.say(node, f"Node {node_id} had ended: {node['state']}." if ended else f"Node {node_id} is told to drain.")

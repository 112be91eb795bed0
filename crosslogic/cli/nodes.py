"""Nodes."""

from __future__ import annotations

from typing import Annotated

import typer

from crosslogic.cli.session import Session, command
from crosslogic.cli.tenancy import Most

app = typer.Typer(no_args_is_help=True)

COLUMNS = ("id", "state", "model", "region", "deployment", "provider", "is_pinned", "reason", "changed_at")
COST_COLUMNS = ("cluster", "place", "machine", "is_spot", "is_running", "hours", "dollars")

# `{port}` is filled in by the agent; the key that the engine must ask for comes in its environment.
COMMANDS = {
    "vllm": "vllm serve MODEL --host 127.0.0.1 --port {port}",
    "sglang": "python3 -m sglang.launch_server --model-path MODEL --port {port} "
    "--api-key {credential} --enable-metrics",
    "llamacpp": "llama-server -m MODEL.gguf --host 127.0.0.1 --port {port} --metrics",
}

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


@command(app, "invite")
def invite_node(
    session: Session,
    model: Model,
    region: Region,
    org: Annotated[str | None, typer.Option(help="Id or name of the org that alone it serves; left out: all.")] = None,
    engine: Annotated[str, typer.Option(help="vllm, sglang or llamacpp.")] = "vllm",
    control_url: Annotated[str | None, typer.Option(help="The API as nodes reach it; left out: as you do.")] = None,
    valid_for_h: Annotated[int, typer.Option(min=1, max=720, help="Hours in which the token can be used.")] = 24,
) -> None:
    """Print the command that makes a machine a node: its agent dials out, registers once and serves."""
    body = {"model": model, "region": region, "org": org, "valid_for_h": valid_for_h}
    invited = session.send("POST", "/nodes/invite", body)
    if session.is_json:
        session.show(invited)
        return
    url = (control_url or session.url).rstrip("/")
    pin = f" CROSSLOGIC_AGENT_CA_SHA256={invited['ca_sha256']}" if invited["ca_sha256"] else ""
    # The file's own fingerprint is checked, so it may come over a connection that cannot be verified yet.
    curl = "curl -fsSk" if pin else "curl -fsS"
    check = f"echo '{invited['agent_sha256']}  crosslogic-agent.pyz' | sha256sum -c -"
    lines = (
        f"{curl} -O {url}/agent/crosslogic-agent.pyz && {check} && env",
        f"CROSSLOGIC_AGENT_CONTROL_URL={url} CROSSLOGIC_AGENT_NODE_ID={invited['node_id']}",
        f"CROSSLOGIC_AGENT_JOIN_TOKEN={invited['join_token']}{pin} CROSSLOGIC_AGENT_ENGINE={engine}",
        f"CROSSLOGIC_AGENT_ENGINE_COMMAND='{COMMANDS.get(engine, 'COMMAND --port {port}')}'",
        "python3 crosslogic-agent.pyz",
    )
    print(" \\\n  ".join(lines))


@command(app, "agents")
def list_agents(session: Session, limit: Most = 100) -> None:
    """List the agents of nodes that have not ended, newest first."""
    columns = ("node_id", "node_state", "org", "engine", "endpoint", "certificate_expires_at", "notice")
    session.show_table(session.get_all("/agents", limit), columns, "No agent has registered.")


@command(app, "logs")
def show_logs(session: Session, node_id: NodeId) -> None:
    """Print the engine's latest lines, and ask for newer ones."""
    logs = session.get(f"/agents/{node_id}/logs")
    session.send("POST", f"/agents/{node_id}/logs", {})
    note = f"(of {logs['at']}; newer ones are asked for: run this again in some seconds)"
    session.say(logs, f"{logs['text']}\n{note}" if logs["at"] else "Asked for: run this again in some seconds.")


@command(app, "renew")
def renew_node(session: Session, node_id: NodeId) -> None:
    """Have a node make a new key and get a new certificate now."""
    session.say(session.send("POST", f"/agents/{node_id}/renew", {}), f"Node {node_id} is told to renew.")


@command(app, "price")
def price_node(
    session: Session,
    node_id: NodeId,
    microdollars_per_h: Annotated[int, typer.Argument(metavar="MICRODOLLARS_PER_H", min=0, help="0: unknown.")],
) -> None:
    """Say what a node costs by the hour: `cost-weighted` deployments fill cheaper ones first."""
    node = session.send("PATCH", f"/nodes/{node_id}", {"price_microdollars_per_h": microdollars_per_h})
    session.say(node, f"Node {node_id} costs ${microdollars_per_h / 1_000_000:g} an hour.")


@command(app, "cost")
def cost_nodes(
    session: Session,
    days: Annotated[int, typer.Option(min=1, max=365, help="Of machines that ran within so many.")] = 30,
    limit: Most = 100,
) -> None:
    """Show what rented machines have cost, by SkyPilot's own account, the dearest first; ended ones too."""
    rows = [
        {
            **row,
            "hours": round(row["duration_s"] / 3600, 2),
            "dollars": f"{row['cost_microdollars'] / 1_000_000:.4f}",
        }
        for row in session.get("/nodes/costs", days=days)["data"][:limit]
    ]
    session.show_table(rows, COST_COLUMNS, "SkyPilot has rented nothing for us in that time.")


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

"""Revisions of deployments, and their roll-outs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from crosslogic.cli.session import Session, command, fail
from crosslogic.cli.tenancy import Most

revisions = typer.Typer(no_args_is_help=True)
rollouts = typer.Typer(no_args_is_help=True)

COLUMNS = ("revision", "state", "engine", "engine_version", "weights", "golden_prompts", "created_at", "created_by")

Deployment = Annotated[str, typer.Argument(metavar="DEPLOYMENT")]
Revision = Annotated[int, typer.Argument(metavar="REVISION", min=1)]


@command(revisions, "list")
def list_revisions(session: Session, deployment: Deployment, limit: Most = 50) -> None:
    """List a deployment's revisions, newest first."""
    rows = session.get_all(f"/deployments/{deployment}/revisions", limit)
    session.show_table(rows, COLUMNS, "There is no such deployment.")


@command(revisions, "create")
def create_revision(
    session: Session,
    deployment: Deployment,
    engine: Annotated[str, typer.Option(help="vllm, sglang or llamacpp.")] = "",
    engine_version: Annotated[str, typer.Option(help="Such as 0.32.0.")] = "",
    weights: Annotated[str, typer.Option(help="What the engine is told to load.")] = "",
    arg: Annotated[list[str] | None, typer.Option(help="Added to the engine's command line; repeat it.")] = None,
    gpu: Annotated[list[str] | None, typer.Option(help="GPUs in the order in which to try them; repeat it.")] = None,
    golden: Annotated[
        Path | None, typer.Option(help="A JSON file: a list of {prompt, expected, match, max_tokens}.")
    ] = None,
) -> None:
    """Write down a deployment's next revision; nothing runs it until it is rolled out."""
    body: dict[str, Any] = {
        "engine": engine,
        "engine_version": engine_version,
        "weights": weights,
        "engine_args": arg or [],
        "gpus": gpu or [],
    }
    if golden is not None:
        try:
            body["golden"] = json.loads(golden.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fail(f"{golden} cannot be read as JSON ({error}).")
    made = session.send("POST", f"/deployments/{deployment}/revisions", body)
    session.say(
        made,
        f"Revision {made['revision']} of {deployment} is there. Roll it out with: "
        f"rollouts start {deployment} {made['revision']}",
    )


@command(rollouts, "start")
def start_rollout(
    session: Session,
    deployment: Deployment,
    revision: Revision,
    hold_at: Annotated[
        float, typer.Option(help="Stop at this percentage of the traffic until it is promoted.", min=0, max=100)
    ] = 0,
    bake_s: Annotated[int, typer.Option(help="How long each share is watched.", min=0)] = 300,
) -> None:
    """Replace the revision that a deployment serves, step by step."""
    body = {"hold_at_bp": round(hold_at * 100), "bake_s": bake_s}
    made = session.send("POST", f"/deployments/{deployment}/revisions/{revision}/rollout", body)
    session.say(made, f"Revision {revision} is on its way. Watch {made['workflow_id']} in the Temporal UI.")


def _signal(session: Session, deployment: str, signal: str, reason: str = "") -> None:
    told = session.send("POST", f"/deployments/{deployment}/rollout/signal", {"signal": signal, "reason": reason})
    session.say(told, f"{told['workflow_id']} is told: {signal}.")


@command(rollouts, "abort")
def abort_rollout(
    session: Session,
    deployment: Deployment,
    reason: Annotated[str, typer.Option(help="Shown in the Temporal UI and in the audit log.")] = "",
) -> None:
    """Return to the revision that served before."""
    _signal(session, deployment, "abort", reason)


@command(rollouts, "pause")
def pause_rollout(session: Session, deployment: Deployment) -> None:
    """Begin no further step for now."""
    _signal(session, deployment, "pause")


@command(rollouts, "resume")
def resume_rollout(session: Session, deployment: Deployment) -> None:
    """Go on after a pause."""
    _signal(session, deployment, "resume")


@command(rollouts, "promote")
def promote_rollout(session: Session, deployment: Deployment) -> None:
    """End the wait that it is in: a canary that is held, or a share that is being watched."""
    _signal(session, deployment, "promote")

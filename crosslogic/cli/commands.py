"""All commands, in their groups."""

from __future__ import annotations

import typer

from crosslogic.cli import billing, catalog, nodes, records, reservations, rollouts, setup, sweeps, tenancy, usage
from crosslogic.cli.session import connection_defaults

app = typer.Typer(
    name="crosslogic",
    help="Administer CrossLogic Inference Cloud through its admin API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback()(connection_defaults)
app.add_typer(tenancy.orgs, name="orgs", help="Orgs: who owns and pays.")
app.add_typer(tenancy.environments, name="environments", help="Environments: dev, staging and prod of an org.")
app.add_typer(tenancy.keys, name="keys", help="Keys: what clients send.")
app.add_typer(tenancy.limits, name="limits", help="Limits of orgs, environments, keys and of everybody.")
app.add_typer(nodes.app, name="nodes", help="Nodes: what serves, and what is on its way.")
app.add_typer(sweeps.app, name="sweeps", help="Sweeps: is every machine in the clouds one that was intended?")
app.add_typer(catalog.deployments, name="deployments", help="Deployments: how many replicas of a model, and where.")
app.add_typer(rollouts.revisions, name="revisions", help="Revisions: what a deployment's nodes run.")
app.add_typer(rollouts.rollouts, name="rollouts", help="Roll-outs: one revision takes the place of another.")
app.add_typer(catalog.deadlines, name="deadlines", help="Deadlines: how long a model's nodes are waited for.")
app.add_typer(usage.app, name="usage", help="Usage: sums of requests and tokens; files of records.")
app.add_typer(billing.app, name="billing", help="Billing: what months cost, prices, credits, the ledger.")
app.add_typer(records.requests, name="requests", help="Requests: what one used, and why it went where it went.")
app.add_typer(reservations.app, name="reservations", help="Reservations: capacity that an org has prepaid.")
app.add_typer(billing.app, name="billing", help="Billing: what Stripe must know.")
app.add_typer(records.audit, name="audit", help="The audit log.")
catalog.register(app)
setup.register(app)


def main() -> None:
    """Run the command that the arguments name."""
    app(prog_name="./run")

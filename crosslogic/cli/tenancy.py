"""Orgs, environments, keys and limits."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from crosslogic.cli.session import Session, command, fail
from crosslogic.domain.tenancy import LIMITS, NO_LIMIT

orgs = typer.Typer(no_args_is_help=True)
environments = typer.Typer(no_args_is_help=True)
keys = typer.Typer(no_args_is_help=True)
limits = typer.Typer(no_args_is_help=True)

Org = Annotated[str, typer.Option("--org", help="The org's name or id.")]
OptionalOrg = Annotated[str | None, typer.Option("--org", help="Only this org's, by name or id.")]
Env = Annotated[str, typer.Option("--env", help="dev, staging or prod.")]
OptionalEnv = Annotated[str | None, typer.Option("--env", help="With --org: dev, staging or prod.")]
Most = Annotated[int, typer.Option("--limit", help="Show at most so many.", min=1, max=100_000)]
KeyId = Annotated[str, typer.Argument(metavar="KEY_ID")]
OrgName = Annotated[str, typer.Argument(metavar="ORG", help="The org's name or id.")]

ORG_COLUMNS = ("name", "id", "state", "plan", "region_preferences", "created_at")
ENVIRONMENT_COLUMNS = ("org", "name", "id", "state", "home_region", "allowed_models")
KEY_COLUMNS = ("id", "org", "environment", "name", "role", "state", "hint", "expires_at")
SECRET_NOTE = "Keep the secret: it is shown this once, and only its hash is stored."


@command(orgs, "create")
def create_org(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")],
    plan: Annotated[str, typer.Option(help="serverless, reserved or enterprise.")] = "serverless",
    region: Annotated[list[str] | None, typer.Option(help="A preferred region, best first; repeat it.")] = None,
) -> None:
    """Create an org. Repeating it is harmless."""
    made = session.send("POST", "/orgs", {"name": name, "plan": plan, "region_preferences": region or []})
    session.show(made)


@command(orgs, "list")
def list_orgs(session: Session, limit: Most = 100) -> None:
    """List orgs."""
    session.show_table(session.get_all("/orgs", limit), ORG_COLUMNS, "There are no orgs.")


@command(orgs, "suspend")
def suspend_org(session: Session, org: OrgName) -> None:
    """Refuse all keys of an org, everywhere within 1 s."""
    made = session.send("PATCH", f"/orgs/{org}", {"state": "suspended"})
    session.say(made, f"Org {made['name']} is suspended.")


@command(orgs, "resume")
def resume_org(session: Session, org: OrgName) -> None:
    """Accept an org's keys again."""
    made = session.send("PATCH", f"/orgs/{org}", {"state": "active"})
    session.say(made, f"Org {made['name']} is active.")


@command(orgs, "set")
def set_org(
    session: Session,
    org: OrgName,
    operator: Annotated[
        bool, typer.Option("--operator/--no-operator", help="Are its keys shown why a node was chosen?")
    ],
) -> None:
    """Make an org an operator's, or a customer's again."""
    session.show(session.send("PATCH", f"/orgs/{org}", {"is_operator": operator}))


@command(environments, "create")
def create_environment(
    session: Session,
    org: Org,
    env: Env,
    home_region: Annotated[str | None, typer.Option(help="Where its requests belong. Left out: the org's.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may use; repeat it. Left out: all.")] = None,
) -> None:
    """Create an environment. Repeating it is harmless."""
    body = {"org": org, "name": env, "home_region": home_region, "allowed_models": model or None}
    session.show(session.send("POST", "/environments", body))


@command(environments, "list")
def list_environments(session: Session, org: OptionalOrg = None, limit: Most = 100) -> None:
    """List environments."""
    rows = session.get_all("/environments", limit, org=org)
    session.show_table(rows, ENVIRONMENT_COLUMNS, "There are no environments.")


@command(keys, "create")
def create_key(
    session: Session,
    org: Org,
    env: Env,
    name: Annotated[str, typer.Option(help="For people.")] = "",
    role: Annotated[str, typer.Option(help="admin, developer or read-only.")] = "developer",
    expires_at: Annotated[str | None, typer.Option(help="Such as 2027-01-01T00:00:00Z. Left out: never.")] = None,
) -> None:
    """Create a key and show its secret, once."""
    body = {"org": org, "environment": env, "name": name, "role": role, "expires_at": expires_at}
    session.show(session.send("POST", "/keys", body), "id", "secret", note=SECRET_NOTE)


@command(keys, "list")
def list_keys(session: Session, org: OptionalOrg = None, env: OptionalEnv = None, limit: Most = 100) -> None:
    """List keys, without their secrets."""
    if env is not None and org is None:
        raise typer.BadParameter("give --org, too", param_hint="--env")
    environment_id = _environment_id(session, org, env) if org is not None and env is not None else None
    rows = session.get_all("/keys", limit, org=org, environment_id=environment_id)
    session.show_table(rows, KEY_COLUMNS, "There are no keys.")


@command(keys, "suspend")
def suspend_key(session: Session, key_id: KeyId) -> None:
    """Refuse a key until it is resumed, everywhere within 1 s."""
    made = session.send("POST", f"/keys/{key_id}/suspend", {})
    session.say(made, f"Key {key_id} is suspended.")


@command(keys, "resume")
def resume_key(session: Session, key_id: KeyId) -> None:
    """Accept a suspended key again."""
    made = session.send("POST", f"/keys/{key_id}/resume", {})
    session.say(made, f"Key {key_id} is active.")


@command(keys, "revoke")
def revoke_key(session: Session, key_id: KeyId) -> None:
    """Refuse a key for ever, everywhere within 1 s."""
    made = session.send("POST", f"/keys/{key_id}/revoke", {})
    session.say(made, f"Key {key_id} is revoked, for ever.")


@command(keys, "rotate")
def rotate_key(
    session: Session,
    key_id: KeyId,
    overlap_s: Annotated[int, typer.Option(help="So many seconds the old key works on.")] = 86_400,
    expires_at: Annotated[
        str | None, typer.Option(help="When the successor expires, or `never`. Needed if the old key expires.")
    ] = None,
) -> None:
    """Make a key's successor and show its secret, once; the old key works on for a while."""
    body: dict[str, Any] = {"overlap_s": overlap_s}
    if expires_at is not None:
        body["expires_at"] = None if expires_at == "never" else expires_at
    made = session.send("POST", f"/keys/{key_id}/rotate", body)
    if session.is_json:
        session.show(made)
    else:
        session.show(made["new"], "id", "secret", note=SECRET_NOTE)
        print(f"Key {key_id} works until {made['old']['expires_at']}.")


LimitOption = Annotated[str | None, typer.Option(metavar="N|none|default")]


@command(limits, "set")
def set_limits(
    session: Session,
    key: Annotated[str | None, typer.Option("--key", metavar="KEY_ID", help="Of a key.")] = None,
    environment: Annotated[str | None, typer.Option("--environment", metavar="ID", help="Of an environment.")] = None,
    org: Annotated[
        str | None, typer.Option("--org", metavar="ORG", help="Of an org; with --env of its environment.")
    ] = None,
    env: OptionalEnv = None,
    everybody: Annotated[bool, typer.Option("--global", help="Of everybody together.")] = False,
    requests_per_min: LimitOption = None,
    tokens_per_min: LimitOption = None,
    tokens_per_day: LimitOption = None,
    concurrency: LimitOption = None,
    monthly_spend_microdollars: LimitOption = None,
    dry_run: Annotated[
        str | None,
        typer.Option(metavar="LIMIT,…|none", help="All limits that shall count and report but refuse nothing."),
    ] = None,
) -> None:
    """Set some limits of one subject and keep the others. `none`: no limit; `default`: the layer's."""
    given = zip(
        LIMITS, (requests_per_min, tokens_per_min, tokens_per_day, concurrency, monthly_spend_microdollars), strict=True
    )
    changes: dict[str, Any] = {name: _limit(name, value) for name, value in given if value is not None}
    if dry_run is not None:
        changes["dry_run"] = [] if dry_run == "none" else _limit_names(dry_run)
    if not changes:
        raise typer.BadParameter("give at least one limit, such as --requests-per-min 120")
    subject = _subject(session, key, environment, org, env, everybody)
    _show_limits(session, session.send("PUT", f"/limits/{subject}", changes))


@command(limits, "show")
def show_limits(
    session: Session,
    key: Annotated[str | None, typer.Option("--key", metavar="KEY_ID", help="Of a key.")] = None,
    environment: Annotated[str | None, typer.Option("--environment", metavar="ID", help="Of an environment.")] = None,
    org: Annotated[
        str | None, typer.Option("--org", metavar="ORG", help="Of an org; with --env of its environment.")
    ] = None,
    env: OptionalEnv = None,
    everybody: Annotated[bool, typer.Option("--global", help="Of everybody together.")] = False,
) -> None:
    """Show what is set for one subject."""
    _show_limits(session, session.get(f"/limits/{_subject(session, key, environment, org, env, everybody)}"))


def _limit(name: str, value: str) -> int | None:
    if value == "default":
        return None
    if value == "none":
        return NO_LIMIT
    try:
        number = int(value.replace("_", ""))
    except ValueError:
        number = -1
    if number < 0:
        raise typer.BadParameter("write a number, none or default", param_hint=f"--{name.replace('_', '-')}")
    return number


def _limit_names(value: str) -> list[str]:
    names = [name.strip().replace("-", "_") for name in value.split(",")]
    if not set(names) <= set(LIMITS):
        raise typer.BadParameter(f"write any of {', '.join(LIMITS)}, or none", param_hint="--dry-run")
    return names


def _subject(
    session: Session, key: str | None, environment: str | None, org: str | None, env: str | None, everybody: bool
) -> str:
    """`layer/subject` of a path."""
    if sum((key is not None, environment is not None, org is not None, everybody)) != 1:
        raise typer.BadParameter("say whose limits: one of --key, --environment, --org [--env] and --global")
    if env is not None:
        if org is None:
            raise typer.BadParameter("give --org, too", param_hint="--env")
        return f"environment/{_environment_id(session, org, env)}"
    if key is not None:
        return f"key/{key}"
    if environment is not None:
        return f"environment/{environment}"
    return "global/all" if org is None else f"org/{org}"


def _environment_id(session: Session, org: str, env: str) -> str:
    found = session.get("/environments", org=org, name=env)["data"]
    if not found:
        fail(f"org {org} has no environment {env}. Create it with: environments create --org {org} --env {env}")
    return str(found[0]["id"])


def _show_limits(session: Session, limits: dict[str, Any]) -> None:
    if session.is_json:
        session.show(limits)
        return
    words = {None: "default", NO_LIMIT: "none"}
    names = [name for name in LIMITS if limits["layer"] == "org" or name != "monthly_spend_microdollars"]
    shown = {name: words.get(limits[name], limits[name]) for name in names}
    if limits["dry_run"]:
        shown["dry_run"] = ", ".join(limits["dry_run"])
    session.show({"subject": limits["subject_id"], **shown})

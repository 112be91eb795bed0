"""`setup`: makes a database and a Temporal namespace ready for the API and the worker. Needs the settings only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from crosslogic.cli.session import fail

if TYPE_CHECKING:
    from crosslogic.settings import Settings

Answer = TypeVar("Answer")

RETRY_INTERVAL_S = 0.25


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("setup")(setup)


def setup(
    wait_s: Annotated[float, typer.Option(help="Wait so long for Postgres and Temporal to answer.", min=0)] = 60.0,
) -> None:
    """Bring the schema up to date, register the search attributes, check the Stripe key; in dev mode sow the demo.

    Where Postgres and Temporal are is taken from the CROSSLOGIC_… settings. Running it again is harmless.
    """
    import asyncio

    from pydantic import ValidationError

    from crosslogic.domain.errors import CrossLogicError
    from crosslogic.settings import settings

    code = 0
    try:
        asyncio.run(_run(settings(), wait_s))
    except ValidationError as error:
        # The values stay out of the message: some of them are secrets.
        problems = "; ".join(
            f"{'CROSSLOGIC_' + str(item['loc'][0]).upper() + ': ' if item['loc'] else ''}"
            f"{item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_input=False)
        )
        fail(f"the settings cannot be used: {problems}")
    except CrossLogicError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        code = 1
    # A process that used temporalio may crash while the interpreter shuts down: leave without that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _run(settings: Settings, wait_s: float) -> None:
    import asyncio

    from crosslogic.store.migrations import migrate

    began = time.monotonic()
    deadline = began + wait_s
    applied = await _wait_for("Postgres", deadline, lambda: migrate(settings.database_url.get_secret_value()))
    _say(began, f"schema: {'applied ' + ', '.join(applied) if applied else 'up to date'}")

    began = time.monotonic()
    from crosslogic.clients import temporal

    async def register() -> list[str]:
        client = await temporal.connect(settings)
        return await temporal.ensure_search_attributes(client, settings.temporal_namespace)

    registered = await _wait_for("Temporal", deadline, register)
    _say(began, f"search attributes: {'registered ' + ', '.join(registered) if registered else 'all there'}")

    if settings.stripe_api_key is not None:
        began = time.monotonic()
        _say(began, f"billing: {await asyncio.to_thread(_check_stripe, settings)}")
        if settings.is_dev:
            began = time.monotonic()
            _say(began, f"billing: {await _set_up_billing(settings)}")

    if not settings.is_dev:
        return
    began = time.monotonic()
    from crosslogic.dev.seeds import sow
    from crosslogic.store import database

    pool = await database.connect(settings)
    try:
        sown = await sow(pool, settings)
    finally:
        await pool.close()
    _say(began, f"demo: {'; '.join(sown) if sown else 'all there'}")


async def _set_up_billing(settings: Settings) -> str:
    """What was made at Stripe, in one line; an outage of Stripe stops nothing."""
    from crosslogic.cli import stripe_setup
    from crosslogic.domain.errors import Unavailable

    try:
        made = await stripe_setup.run(settings)
    except Unavailable as error:
        return error.message
    return f"made {len(made)} things at Stripe" if made else "all there"


def _check_stripe(settings: Settings) -> str:
    """Which account the key opens. Raises Rejected for a key that opens none; an outage of Stripe stops nothing."""
    from crosslogic.clients import stripe
    from crosslogic.domain.errors import Unavailable

    assert settings.stripe_api_key is not None
    try:
        return stripe.check_account(
            stripe.connect(settings.stripe_api_key.get_secret_value(), base_url=settings.stripe_url or None)
        )
    except Unavailable as error:
        return error.message


async def _wait_for(what: str, deadline: float, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
    """The first answer before the deadline. Raises the last Unavailable after it."""
    import asyncio

    from crosslogic.domain.errors import Unavailable

    is_first = True
    while True:
        try:
            return await attempt()
        except Unavailable:
            if time.monotonic() >= deadline:
                raise
        if is_first:
            print(f"waiting for {what} to answer", flush=True)
            is_first = False
        await asyncio.sleep(RETRY_INTERVAL_S)


def _say(began: float, line: str) -> None:
    print(f"{line}  ({time.monotonic() - began:.1f} s)", flush=True)

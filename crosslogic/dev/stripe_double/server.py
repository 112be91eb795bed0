"""The double's process: Stripe's API and, below `/control`, what Stripe has no API for: its faults and its clock.

`python -m crosslogic.dev.stripe_double`. It listens on the port of CROSSLOGIC_STRIPE_URL and admits the one key in
CROSSLOGIC_STRIPE_API_KEY.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from crosslogic.dev.stripe_double import invoicing, routes
from crosslogic.dev.stripe_double.behaviour import Behaviour
from crosslogic.dev.stripe_double.books import Body, Books
from crosslogic.dev.stripe_double.parameters import checked, read_form
from crosslogic.dev.stripe_double.refusals import Refusal, unknown_path
from crosslogic.dev.stripe_double.webhooks import Postman
from crosslogic.settings import settings

_log = logging.getLogger(__name__)

# What stripe-python 16 sends; a test holds it to the library that is installed.
API_VERSION = "2026-10-28.endive"

_TICK_S = 0.2
_METER_EVENTS = "POST /v1/billing/meter_events"
_EARLY: dict[str, tuple[int, str, str, str]] = {
    "conflict": (409, "invalid_request_error", "idempotency_key_in_use", "Another request uses this idempotency key."),
    "rate_limited": (429, "invalid_request_error", "rate_limit", "Too many requests hit the API too quickly."),
    "lock_timeout": (429, "invalid_request_error", "lock_timeout", "Another request accesses this object right now."),
    "unavailable": (503, "api_error", "", "Stripe is temporarily unavailable."),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ClockOrder(_Strict):
    """Stop the clock at an instant (Unix seconds), move it ahead, or let it run with the wall's again."""

    frozen_at: float | None = None
    advance_s: float = Field(default=0.0, ge=0, le=400 * 86_400)
    is_real: bool = False


class PaymentOrder(_Strict):
    """What happens to a customer's payments from now on."""

    customer: str
    outcome: Literal["succeed", "fail"]


class DisputeOrder(_Strict):
    """Dispute what paid an invoice, or decide a dispute."""

    invoice: str = ""
    dispute: str = ""
    status: Literal["won", "lost"] = "lost"


class Door:
    """The HTTP side: keys, idempotency, limits and faults around the operations."""

    def __init__(self, books: Books, api_key: str) -> None:
        self._books = books
        self._api_key = api_key
        self._in_flight: set[str] = set()
        self._metered: set[tuple[str, str]] = set()
        self._recent: deque[float] = deque()
        self._requests = 0
        self._postman = Postman(books)
        self.server: uvicorn.Server | None = None

    def application(self) -> Starlette:
        """The ASGI application."""
        control = {
            ("GET", "/control/behaviour"): self._show_behaviour,
            ("PUT", "/control/behaviour"): self._behave,
            ("GET", "/control/clock"): self._show_clock,
            ("PUT", "/control/clock"): self._set_clock,
            ("GET", "/control/calls"): self._show_calls,
            ("PUT", "/control/payments"): self._order_payments,
            ("POST", "/control/disputes"): self._dispute,
            ("DELETE", "/control/account"): self._forget,
            ("GET", "/control/thin-events"): self._show_thin_events,
        }
        ours = [Route(path, self._guarded(handler), methods=[method]) for (method, path), handler in control.items()]
        every = ["GET", "POST", "PUT", "PATCH", "DELETE"]
        return Starlette(
            routes=[*ours, Route("/{path:path}", self._handle, methods=every)],
            exception_handlers={ValidationError: _answer_invalid, Refusal: _answer_refused},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        tasks = [asyncio.create_task(self._postman.run()), asyncio.create_task(self._keep_time())]
        for task in tasks:
            # Nobody waits for them until the end: if one fails, the process must, and be started again.
            task.add_done_callback(self._stop_with)
        yield
        for task in tasks:
            task.remove_done_callback(self._stop_with)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _stop_with(self, task: asyncio.Task[None]) -> None:
        _log.error("a task of the double failed", exc_info=task.exception())
        if self.server:
            self.server.should_exit = True

    async def _keep_time(self) -> None:
        while True:
            if not self._books.is_frozen:
                self._run_due(self._books.now)
            await asyncio.sleep(_TICK_S)

    def _run_due(self, until: float) -> None:
        """Everything that happens by itself until then, in its order."""
        while (due := invoicing.next_due(self._books)) and due[0] <= until:
            with self._books.transaction():
                if self._books.is_frozen and due[0] > self._books.now:
                    self._books.set_clock(due[0])
                due[1]()

    # Stripe's API.

    async def _handle(self, request: Request) -> Response:
        self._requests += 1
        text = (await request.body()).decode("utf-8", "replace")
        path, key = request.url.path, request.headers.get("idempotency-key", "")
        try:
            status, body, headers = await self._answer(request, text, key)
        except Refusal as error:
            status, body, headers = error.status, error.body, {}
        with self._books.transaction():
            self._books.note_call(request.method, path, key, status)
        if status == 0:
            await self._hang_up(request)
            return Response()
        headers |= {"request-id": f"req_double{self._requests:08d}", "stripe-version": API_VERSION}
        return JSONResponse(body, status, headers | ({"idempotency-key": key} if key else {}))

    async def _answer(self, request: Request, text: str, key: str) -> tuple[int, Body, dict[str, str]]:
        """Status (0: none, hang up), body and headers. Raises Refusal."""
        self._admit(request)
        method, path = request.method, request.url.path
        found = routes.find(method, path)
        if found is None:
            raise unknown_path(method, path)
        operation, answer = found
        fault = self._books.behaviour.next_fault(operation.name, text)
        if fault:
            _log.info("fault: %s of %s", fault.kind, operation.name)
            with self._books.transaction():
                self._books.save_behaviour()
        kind = fault.kind if fault else ""
        if kind in _EARLY:
            raise _early(kind)
        self._limit()
        params = _params(request, text)
        fingerprint = hashlib.sha256(f"{method} {path} {text}".encode()).hexdigest()
        key = key if method == "POST" else ""
        replayed = self._replayed(key, fingerprint)
        if replayed:
            return replayed
        params = checked(params, operation.schema)
        lock = ("", "")
        if operation.name == _METER_EVENTS:
            lock = (params["event_name"], str(params["payload"].get("stripe_customer_id")))
            if lock in self._metered:
                raise _early("lock_timeout")
            self._metered.add(lock)
        if key:
            self._in_flight.add(key)
        try:
            if fault and kind == "slow":
                await asyncio.sleep(fault.delay_s)
            return self._execute(operation, answer, params, key, fingerprint, kind)
        finally:
            self._in_flight.discard(key)
            self._metered.discard(lock)

    def _execute(
        self,
        operation: routes.Operation,
        answer: Callable[..., Body],
        params: Body,
        key: str,
        fingerprint: str,
        fault: str,
    ) -> tuple[int, Body, dict[str, str]]:
        more = {"key": key, "fault": fault} if operation.name == _METER_EVENTS else {}
        failed: Body = {"error": {"type": "api_error", "message": "An unknown error occurred."}}
        status, body = 500, failed
        with self._books.transaction():
            if fault != "error_before":
                self._books.database.execute("SAVEPOINT effect")
                try:
                    body = answer(self._books, params, **more)
                    # A payment that was declined: its attempt stands, and its caller is told.
                    status = 402 if "error" in body else 200
                except Refusal as error:
                    self._books.database.execute("ROLLBACK TO effect")
                    status, body = error.status, error.body
                    key = key if error.is_kept else ""
                if fault == "error_after":
                    status, body = 500, failed
            if key:
                self._books.keep_reply(key, fingerprint, status, body)
        return (0 if fault == "lost_reply" else status), body, {}

    def _admit(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self._api_key.encode()):
            message = "Invalid API Key provided." if given else "You did not provide an API key."
            raise Refusal(message, status=401, is_kept=False)
        version = request.headers.get("stripe-version", API_VERSION)
        if version != API_VERSION:
            raise Refusal(f"Invalid Stripe API version: {version}", is_kept=False)

    def _limit(self) -> None:
        now = time.monotonic()
        while self._recent and self._recent[0] <= now - 1:
            self._recent.popleft()
        if len(self._recent) >= self._books.behaviour.calls_per_s:
            raise _early("rate_limited")
        self._recent.append(now)

    def _replayed(self, key: str, fingerprint: str) -> tuple[int, Body, dict[str, str]] | None:
        if not key:
            return None
        if key in self._in_flight:
            raise _early("conflict")
        stored = self._books.reply_of(key)
        if stored is None:
            return None
        if stored["fingerprint"] != fingerprint:
            raise Refusal(
                "Keys for idempotent requests can only be used with the same parameters they were first used with.",
                kind="idempotency_error",
                is_kept=False,
            )
        return stored["status"], json.loads(stored["body"]), {"idempotent-replayed": "true"}

    async def _hang_up(self, request: Request) -> None:
        """Close the request's connection as a broken network would: no status, no body."""
        assert self.server is not None
        for connection in list(self.server.server_state.connections):
            if getattr(connection, "client", None) == request.scope["client"]:
                connection.transport.abort()  # type: ignore[union-attr]
        # Once the server has noticed, it sends nothing of what is returned.
        while (await request.receive())["type"] != "http.disconnect":
            pass

    # Control.

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            self._admit(request)
            return await handler(request)

        return handle

    async def _show_behaviour(self, _: Request) -> Response:
        return JSONResponse(self._books.behaviour.model_dump())

    async def _behave(self, request: Request) -> Response:
        self._books.behaviour = Behaviour.model_validate_json(await request.body())
        with self._books.transaction():
            self._books.save_behaviour()
        return await self._show_behaviour(request)

    async def _show_clock(self, _: Request) -> Response:
        return JSONResponse({"now": self._books.now, "is_frozen": self._books.is_frozen})

    async def _set_clock(self, request: Request) -> Response:
        order = ClockOrder.model_validate_json(await request.body())
        if order.is_real:
            with self._books.transaction():
                self._books.set_clock(None)
            self._run_due(self._books.now)
            return await self._show_clock(request)
        if not self._books.is_frozen:
            with self._books.transaction():
                self._books.set_clock(self._books.now if order.frozen_at is None else order.frozen_at)
        target = (self._books.now if order.frozen_at is None else order.frozen_at) + order.advance_s
        if target < self._books.now:
            raise Refusal("The clock does not go back.", param="frozen_at", is_kept=False)
        self._run_due(target)
        with self._books.transaction():
            self._books.set_clock(target)
        return await self._show_clock(request)

    async def _forget(self, request: Request) -> Response:
        self._books.forget()
        return await self._show_clock(request)

    async def _show_calls(self, request: Request) -> Response:
        return JSONResponse({"calls": self._books.calls(int(request.query_params.get("after", "0")))})

    async def _show_thin_events(self, _: Request) -> Response:
        return JSONResponse({"events": self._books.all("v2.core.event")})

    async def _order_payments(self, request: Request) -> Response:
        order = PaymentOrder.model_validate_json(await request.body())
        with self._books.transaction():
            self._books.write_note(f"pays {order.customer}", {"outcome": order.outcome})
        return JSONResponse(order.model_dump())

    async def _dispute(self, request: Request) -> Response:
        order = DisputeOrder.model_validate_json(await request.body())
        with self._books.transaction():
            made = (
                invoicing.close_dispute(self._books, order.dispute, order.status)
                if order.dispute
                else invoicing.open_dispute(self._books, order.invoice)
            )
        return JSONResponse(made)


def _early(kind: str) -> Refusal:
    status, error, code, message = _EARLY[kind]
    return Refusal(message, status=status, kind=error, code=code or None, is_kept=False)


def _params(request: Request, text: str) -> dict[str, Any]:
    """The parameters as they were sent: a form, or JSON below /v2."""
    if request.method in ("GET", "DELETE"):
        return read_form(request.url.query)
    if not request.url.path.startswith("/v2/"):
        return read_form(text)
    try:
        body = json.loads(text or "{}")
    except ValueError:
        raise Refusal("Invalid JSON.", is_kept=False) from None
    if not isinstance(body, dict):
        raise Refusal("The body must be a JSON object.", is_kept=False)
    return body  # pyright: ignore[reportUnknownVariableType]


def _answer_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status)


def _answer_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
    return JSONResponse(Refusal(problems, is_kept=False).body, 400)


def open_books(folder: Path, first: Behaviour) -> Books:
    """The account kept in a folder; `first` is how a new one behaves."""
    folder.mkdir(parents=True, exist_ok=True)
    books = Books(folder / "account.sqlite")
    if not books.note("behaviour"):
        books.behaviour = first
        with books.transaction():
            books.save_behaviour()
    return books


def main() -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = settings()
    if not config.is_dev or config.stripe_api_key is None or not config.stripe_url:
        sys.exit("The double is for dev mode: set CROSSLOGIC_MODE=dev, CROSSLOGIC_STRIPE_URL and …_STRIPE_API_KEY.")
    # One who watches should see a month close: its draft is not kept for an hour.
    books = open_books(config.state_dir / "stripe", Behaviour(draft_s=20.0))
    door = Door(books, config.stripe_api_key.get_secret_value())
    door.server = uvicorn.Server(
        uvicorn.Config(
            door.application(),
            host="127.0.0.1",
            port=urlsplit(config.stripe_url).port or 8791,
            lifespan="on",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=1,
        )
    )
    door.server.run()


if __name__ == "__main__":
    main()

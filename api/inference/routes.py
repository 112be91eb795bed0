"""The OpenAI surface under `/v1`: no framework between the socket and the relay."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from random import Random
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

import msgspec

from api.errors import error_body
from api.inference.auth import KeyRing
from api.inference.calls import PATHS, Call, check_fit, read_call
from api.inference.limits import Limits
from api.inference.metering import UsageLog
from api.inference.observing import Observer
from api.inference.proxy import Relay, now_ms
from api.inference.relayed import Relayed
from api.inference.router import RouteTable
from api.inference.server import BodyTooLarge, Exchange
from api.inference.tracing import Marks, Trace, Tracer
from crosslogic.domain.catalog import Catalog, Model
from crosslogic.domain.errors import CrossLogicError, InvariantViolated, Rejected, Unavailable
from crosslogic.domain.ids import REQUEST, uuid7
from crosslogic.domain.keys import Action, redact, role_allows
from crosslogic.domain.limits import Hold, LimitReached, Refusal, Reserved
from crosslogic.domain.regions import RegionPlan
from crosslogic.domain.reservation import Holder
from crosslogic.domain.tenancy import Principal
from crosslogic.domain.usage import Intent, list_price_microdollars

log = logging.getLogger("crosslogic.inference")

LONGEST_CLIENT_REQUEST_ID = 128
# What the whole request may take to arrive; slower clients hold memory for nothing.
BODY_TIMEOUT_S = 60.0
SECONDS_PER_MINUTE = 60
# A reservation is counted in buckets of so many seconds: sooner there is no room again.
RESERVATION_WAIT_S = 5.0
# Ways to write a region, times ways to prefer some.
MOST_PLANS = 10_000

ReadUsage = Callable[[Principal, Mapping[str, str]], Awaitable[dict[str, Any]]]

_encode = msgspec.json.Encoder().encode


class WrongMethod(Rejected):
    """There is something at this path, for another method."""

    def __init__(self, path: str, method: str) -> None:
        super().__init__(f"Use {method} for {path}.", status=405, code="method_not_allowed")
        self.allow = "GET, HEAD" if method == "GET" else method


class _Arrived:
    """A request before its call is read. `at` is on the loop's clock."""

    __slots__ = (
        "at",
        "client_request_id",
        "content_length",
        "exchange",
        "id",
        "marks",
        "principal",
        "region",
        "shown_id",
        "trace",
    )

    def __init__(self, exchange: Exchange, id: UUID, at: float) -> None:
        self.exchange = exchange
        self.id = id
        self.shown_id = REQUEST.show(id)
        self.at = at
        self.region = b""
        self.client_request_id = b""
        self.content_length = -1
        self.principal: Principal | None = None
        self.trace: Trace | None = None
        self.marks: Marks | None = None


class Inference:
    """Answers every `/v1` request. `catalog` is set, and set anew, by the feed."""

    def __init__(
        self,
        *,
        keys: KeyRing,
        limits: Limits,
        table: RouteTable,
        relay: Relay,
        usage_log: UsageLog,
        observer: Observer,
        read_usage: ReadUsage,
        max_body_bytes: int,
        tracer: Tracer,
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._table = table
        self._relay = relay
        self._usage_log = usage_log
        self._observer = observer
        self._read_usage = read_usage
        self._max_body_bytes = max_body_bytes
        self._tracer = tracer
        # Ids must differ, not be secret: no call into the kernel for each.
        self._random_bits = Random(os.urandom(32)).getrandbits
        # What is the same for many requests, until the catalog changes.
        self._plans: dict[tuple[str, tuple[str, ...]], RegionPlan] = {}
        self._reserved: dict[Holder, Reserved] = {}
        self._loop = asyncio.get_running_loop()
        self._catalog: Catalog | None = None
        relay.on_error = self._fail

    @property
    def catalog(self) -> Catalog:
        """Models and regions. Raises Unavailable before the first reading."""
        if self._catalog is None:
            raise Unavailable("The service is starting; try again in a moment.", code="starting")
        return self._catalog

    @catalog.setter
    def catalog(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._plans = {}
        self._reserved = {
            holder: Reserved(held.id, SECONDS_PER_MINUTE * held.capacity_units)
            for holder, held in catalog.reservations.items()
        }
        self._relay.take_catalog(catalog)

    def __call__(self, exchange: Exchange) -> None:
        """Take one HTTP request whose path starts with `/v1/` as far as it goes at once. Raises nothing.

        A request is in a task only while it has to wait for more than the limits' decision and one node's answer.
        """
        arrived = _Arrived(exchange, uuid7(now_ms(), self._random_bits(80)), self._loop.time())
        authorization = traceparent = tracestate = b""
        try:
            for name, value in exchange.headers:
                if name == b"authorization":
                    authorization = value
                elif name == b"content-length":
                    arrived.content_length = _content_length(value)
                elif name == b"x-crosslogic-region":
                    arrived.region = value
                elif name == b"x-request-id":
                    arrived.client_request_id = value
                elif name == b"traceparent":
                    traceparent = value
                elif name == b"tracestate":
                    tracestate = value
            arrived.trace = self._tracer.begin(traceparent, tracestate)
            principal = self._keys.known(authorization)
            if principal is None or exchange.more_body or exchange.path not in PATHS:
                exchange.spawn(self._wait(arrived, authorization))
            else:
                self._check(exchange, self._identify(arrived, principal))
                self._place(arrived, principal, exchange.body)
        except Exception as error:
            self._refuse(arrived, error)

    async def _wait(self, arrived: _Arrived, authorization: bytes) -> None:
        """What needs Postgres, or the rest of the body."""
        exchange = arrived.exchange
        try:
            principal = self._identify(arrived, await self._keys.authenticate(authorization))
            if exchange.path not in PATHS:
                await self._look_up(arrived, principal)
            else:
                self._check(exchange, principal)
                self._place(arrived, principal, await self._read_body(exchange, arrived.content_length))
        except ConnectionError:
            # The client hung up before its request was complete: there is nobody to answer.
            exchange.abort()
        except Exception as error:
            self._refuse(arrived, error)
        except BaseException:
            exchange.abort()
            raise

    def _identify(self, arrived: _Arrived, principal: Principal) -> Principal:
        arrived.principal = principal
        # Where time went and why is for those who run this, not for tenants.
        if principal.is_operator:
            arrived.marks = Marks(arrived.at)
            arrived.marks.authenticated = time.monotonic()
        return principal

    def _check(self, exchange: Exchange, principal: Principal) -> None:
        """May it run a model at all?"""
        if exchange.method != b"POST":
            raise WrongMethod(exchange.path, "POST")
        if not role_allows(principal.role, Action.INFER):
            raise Rejected(
                f"A {principal.role} key may not run models; use a developer key.", status=403, code="role_not_allowed"
            )

    def _place(self, arrived: _Arrived, principal: Principal, raw: bytes) -> None:
        """Read the call and ask the limits; their decision calls back. Raises Rejected."""
        exchange = arrived.exchange
        call = read_call(exchange.path, raw, exchange.query, arrived.region.decode("latin-1"))
        model = self._resolve(call, principal)
        plan = self._plan(call.region, principal.region_preferences)
        multiplier_bp = self.catalog.regions.regions[plan.home].multiplier_bp
        output_price = model.output_price_e10 or 0
        tokens = call.held_tokens(model)
        spend = list_price_microdollars(
            call.estimated_prompt_tokens,
            tokens - call.estimated_prompt_tokens,
            model.input_price_e10,
            output_price,
            multiplier_bp,
        )
        intent = Intent(
            id=arrived.id,
            client_request_id=_shown_client_id(arrived.client_request_id),
            org_id=principal.org_id,
            environment_id=principal.environment_id,
            key_id=principal.key_id,
            home_region=plan.home,
            model=model.name,
            endpoint_kind=call.kind,
            is_streamed=call.is_streamed,
            estimated_prompt_tokens=call.estimated_prompt_tokens,
            input_price_e10=model.input_price_e10,
            output_price_e10=output_price,
            multiplier_bp=multiplier_bp,
        )
        shown_id = arrived.shown_id
        # Priced by its home region, wherever it runs: on nodes of the org's own too.
        plan = self._table.own_plan(principal.org_id, model.name, plan)
        relayed = Relayed(exchange, principal, arrived.id, shown_id, call, model, plan, intent, self._loop, arrived.at)
        relayed.trace, relayed.marks = arrived.trace, arrived.marks
        reserved = self._reserved.get((principal.org_id, model.name, intent.home_region)) if self._reserved else None
        self._limits.ask(shown_id, principal, tokens, spend, reserved, partial(self._decided, relayed))

    def _decided(self, relayed: Relayed, decision: Hold | Refusal | InvariantViolated) -> None:
        """The limits have decided: write the intent; from here on the request leaves exactly one usage record."""
        try:
            hold = self._limits.granted(relayed.principal, decision)
            self._observer.hold_placed()
            reserved = hold.reservation
            if reserved is not None:
                if hold.is_reserved:
                    relayed.intent.reservation_id = reserved.id
                else:
                    self._check_overage(relayed, hold)
            try:
                self._usage_log.intend(relayed.intent)
            except BaseException:
                self._limits.release(hold)
                raise
            relayed.hold = hold
            relayed.is_admitted = True
            if relayed.marks is not None:
                relayed.marks.limited = time.monotonic()
            self._relay.begin(relayed)
        except Exception as error:
            self._fail(relayed, error)

    def _check_overage(self, relayed: Relayed, hold: Hold) -> None:
        """It found no room in its reservation: may it run besides?"""
        home = relayed.intent.home_region
        held = self.catalog.reservations.get((relayed.principal.org_id, relayed.model.name, home))
        if held is not None and not held.overage:
            self._limits.release(hold)
            raise Rejected(
                f"The reservation for {relayed.model.name} in {home} is used up for this minute and allows no overage; "
                "try again shortly.",
                status=429,
                code="reservation_exhausted",
                retry_after_s=RESERVATION_WAIT_S,
            )

    def _plan(self, region: str, preferences: tuple[str, ...]) -> RegionPlan:
        plan = self._plans.get((region, preferences))
        if plan is None:
            regions = self.catalog.regions
            plan = regions.plan(regions.wish(region) if region else None, preferences)
            if len(self._plans) < MOST_PLANS:
                self._plans[(region, preferences)] = plan
        return plan

    def _resolve(self, call: Call, principal: Principal) -> Model:
        model = self.catalog.resolve_model(call.model)
        if model is None:
            raise Rejected(
                f"The model {call.model[:100]!r} does not exist. GET /v1/models lists those that do.",
                status=404,
                code="model_not_found",
                param="model",
            )
        if principal.allowed_models is not None and model.name not in principal.allowed_models:
            raise Rejected(
                f"This environment may not use {model.name}. Its org's admin can allow it.",
                status=403,
                code="model_not_allowed",
                param="model",
            )
        check_fit(call, model)
        return model

    async def _read_body(self, exchange: Exchange, length: int) -> bytes:
        most = self._max_body_bytes
        if length > most:
            raise self._too_large()
        try:
            if not exchange.more_body:
                return await exchange.read_body(most)
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await exchange.read_body(most)
        except BodyTooLarge as error:
            raise self._too_large() from error
        except TimeoutError as error:
            raise Rejected("The body did not arrive in time.", status=408, code="body_timeout") from error

    def _too_large(self) -> Rejected:
        return Rejected(f"The body is larger than {self._max_body_bytes} bytes.", status=413, code="body_too_large")

    # Look-ups

    async def _look_up(self, arrived: _Arrived, principal: Principal) -> None:
        exchange = arrived.exchange
        path = exchange.path
        if path == "/v1/models" or path.startswith("/v1/models/") or path == "/v1/usage":
            if exchange.method not in (b"GET", b"HEAD"):
                raise WrongMethod(path, "GET")
        else:
            raise Rejected(f"There is nothing at {path[:200]}. See GET /openapi.json.", status=404, code="not_found")
        if path == "/v1/usage":
            if not role_allows(principal.role, Action.READ_USAGE):
                raise Rejected("This key may not read usage.", status=403, code="role_not_allowed")
            values = parse_qs(exchange.query.decode("latin-1"), max_num_fields=32)
            answer = await self._read_usage(principal, {name: found[-1] for name, found in values.items()})
        elif path == "/v1/models":
            answer = {
                "object": "list",
                "data": [card for model in self._visible(principal) for card in self._cards(model)],
            }
        else:
            name = path.removeprefix("/v1/models/")
            model = self.catalog.resolve_model(name)
            if model is None or model not in self._visible(principal):
                raise Rejected(
                    f"The model {name[:100]!r} does not exist. GET /v1/models lists those that do.",
                    status=404,
                    code="model_not_found",
                    param="model",
                )
            answer = self._card(model, name)
        exchange.respond(200, self._head(arrived.shown_id, principal), _encode(answer))

    def _visible(self, principal: Principal) -> list[Model]:
        allowed = principal.allowed_models
        return [model for model in self.catalog.models.values() if allowed is None or model.name in allowed]

    def _cards(self, model: Model) -> list[dict[str, Any]]:
        return [self._card(model, name) for name in (model.name, *model.aliases)]

    def _card(self, model: Model, name: str) -> dict[str, Any]:
        """A model as OpenAI's SDKs expect it, and what we know besides. Prices are USD a million tokens."""
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "crosslogic",
            "canonical": model.name,
            "family": model.family,
            "type": model.kind,
            "context_length": model.context_tokens,
            "price": {
                "input": _dollars(model.input_price_e10),
                "output": None if model.output_price_e10 is None else _dollars(model.output_price_e10),
            },
            "regions": self._table.regions_of(model.name),
            "metadata": dict(model.metadata),
        }

    # Errors

    def _refuse(self, arrived: _Arrived, error: Exception) -> None:
        """Answer what was never admitted, and leaves no usage record."""
        if not isinstance(error, CrossLogicError):
            log.error("request %s failed by our own fault", arrived.shown_id, exc_info=error)
        self._observer.refused(getattr(error, "code", "internal"))
        self._send_error(error, arrived.exchange, arrived.shown_id, self._head(arrived.shown_id, arrived.principal))

    def _fail(self, relayed: Relayed, error: Exception) -> None:
        """Answer what came as far as the limits, unless its answer has begun."""
        if not isinstance(error, CrossLogicError):
            log.error("request %s failed by our own fault", relayed.shown_id, exc_info=error)
        if relayed.is_admitted:
            head = relayed.head(b"application/json")
        else:
            self._observer.refused(getattr(error, "code", "internal"))
            if isinstance(error, LimitReached):
                self._observer.hold_refused(error.layer, error.limit)
                head = self._head(relayed.shown_id, None) + error.standing.lines()
            else:
                head = self._head(relayed.shown_id, relayed.principal)
        if not relayed.has_begun:
            self._send_error(error, relayed.exchange, relayed.shown_id, head)

    def _head(self, shown_id: str, principal: Principal | None) -> bytes:
        head = b"content-type: application/json\r\nx-request-id: %b\r\n" % shown_id.encode()
        return head if principal is None else head + self._limits.standing_of(principal).lines()

    def _send_error(self, error: Exception, exchange: Exchange, shown_id: str, head: bytes) -> None:
        status, body, more = error_body(error, shown_id)
        if isinstance(error, WrongMethod):
            more = {**more, "allow": error.allow}
        head += b"".join([f"{name}: {value}\r\n".encode() for name, value in more.items()])
        exchange.respond(status, head, _encode(body))


def _shown_client_id(given: bytes) -> str:
    """A client's own id of its request, as it is kept."""
    if not given:
        return ""
    # Postgres has no place for NUL in text.
    return redact(given[:LONGEST_CLIENT_REQUEST_ID].replace(b"\0", b"").decode("latin-1"))


def _content_length(value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise Rejected("Content-Length is not a number.", code="invalid_content_length")
    return int(value)


def _dollars(price_e10: int) -> str:
    """USD a million tokens, exact, from 10⁻¹⁰ USD a token."""
    whole, rest = divmod(price_e10, 10_000)
    return f"{whole}.{rest:04d}".rstrip("0").ljust(len(str(whole)) + 3, "0")

"""The OpenAI surface under `/v1`: no framework between the socket and the relay."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
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
from api.inference.tracing import Marks, Tracer
from crosslogic.domain.catalog import Catalog, Model
from crosslogic.domain.errors import CrossLogicError, Rejected, Unavailable
from crosslogic.domain.ids import REQUEST, uuid7
from crosslogic.domain.keys import Action, redact, role_allows
from crosslogic.domain.limits import LimitReached, Reserved
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

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one HTTP request whose path starts with `/v1/`. Raises nothing."""
        started, started_at = time.monotonic(), self._loop.time()
        request_id = uuid7(now_ms(), self._random_bits(80))
        shown_id = REQUEST.show(request_id)
        authorization = region = client_request_id = traceparent = tracestate = b""
        length = -1
        relayed: Relayed | None = None
        try:
            for name, value in exchange.headers:
                if name == b"authorization":
                    authorization = value
                elif name == b"content-length":
                    length = _content_length(value)
                elif name == b"x-crosslogic-region":
                    region = value
                elif name == b"x-request-id":
                    client_request_id = value
                elif name == b"traceparent":
                    traceparent = value
                elif name == b"tracestate":
                    tracestate = value
            trace = self._tracer.begin(traceparent, tracestate)
            principal = await self._keys.authenticate(authorization)
            # Where time went and why is for those who run this, not for tenants.
            marks = Marks(started) if principal.is_operator else None
            if marks is not None:
                marks.authenticated = time.monotonic()
            path = exchange.path
            if path not in PATHS:
                await self._look_up(path, exchange, principal, shown_id)
                return
            if exchange.method != b"POST":
                raise Rejected(f"Use POST for {path}.", status=405, code="method_not_allowed")
            if not role_allows(principal.role, Action.INFER):
                raise Rejected(
                    f"A {principal.role} key may not run models; use a developer key.",
                    status=403,
                    code="role_not_allowed",
                )
            raw = await self._read_body(exchange, length)
            call = read_call(path, raw, exchange.query, region.decode("latin-1"))
            model = self._resolve(call, principal)
            relayed = await self._admit(
                exchange, request_id, shown_id, call, model, principal, client_request_id, started_at
            )
            relayed.trace, relayed.marks = trace, marks
            if marks is not None:
                marks.limited = time.monotonic()
            await self._relay.run(relayed)
        except ConnectionError:
            # The client hung up before its request was complete: there is nobody to answer.
            pass
        except CrossLogicError as error:
            if relayed is None:
                self._observer.refused(getattr(error, "code", "internal"))
            if isinstance(error, LimitReached):
                self._observer.hold_refused(error.layer, error.limit)
            self._send_error(error, shown_id, relayed, exchange)
        except Exception as error:
            log.exception("request %s failed by our own fault", shown_id)
            if relayed is None or not relayed.has_begun:
                self._send_error(error, shown_id, relayed, exchange)
        finally:
            if not exchange.response_complete:
                # A broken connection is the one honest end of an answer that cannot be completed.
                exchange.abort()

    async def _admit(
        self,
        exchange: Exchange,
        request_id: UUID,
        shown_id: str,
        call: Call,
        model: Model,
        principal: Principal,
        client_request_id: bytes,
        started_at: float,
    ) -> Relayed:
        """Place the hold, then write the intent: from here on the request leaves exactly one usage record."""
        catalog = self.catalog
        plan = self._plan(call.region, principal.region_preferences)
        multiplier_bp = catalog.regions.regions[plan.home].multiplier_bp
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
            id=request_id,
            # Postgres has no place for NUL in text.
            client_request_id=redact(
                client_request_id[:LONGEST_CLIENT_REQUEST_ID].replace(b"\0", b"").decode("latin-1")
            ),
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
        holder = (principal.org_id, model.name, plan.home)
        reserved = self._reserved.get(holder) if self._reserved else None
        hold = await self._limits.place(shown_id, principal, tokens, spend, reserved)
        self._observer.hold_placed()
        if reserved is not None and not hold.is_reserved and not catalog.reservations[holder].overage:
            self._limits.release(hold)
            raise Rejected(
                f"The reservation for {model.name} in {plan.home} is used up for this minute and allows no overage; "
                "try again shortly.",
                status=429,
                code="reservation_exhausted",
                retry_after_s=RESERVATION_WAIT_S,
            )
        if reserved is not None and hold.is_reserved:
            intent.reservation_id = reserved.id
        try:
            self._usage_log.intend(intent)
        except BaseException:
            self._limits.release(hold)
            raise
        # Priced by its home region, wherever it runs: on nodes of the org's own too.
        plan = self._table.own_plan(principal.org_id, model.name, plan)
        return Relayed(
            exchange, principal, request_id, shown_id, call, model, plan, hold, intent, self._loop, started_at
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

    async def _look_up(self, path: str, exchange: Exchange, principal: Principal, shown_id: str) -> None:
        if path == "/v1/models" or path.startswith("/v1/models/") or path == "/v1/usage":
            if exchange.method not in (b"GET", b"HEAD"):
                raise Rejected(f"Use GET for {path}.", status=405, code="method_not_allowed")
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
        head = b"content-type: application/json\r\nx-request-id: %b\r\n" % shown_id.encode()
        exchange.respond(200, head, _encode(answer))

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

    def _send_error(self, error: Exception, shown_id: str, relayed: Relayed | None, exchange: Exchange) -> None:
        status, body, more = error_body(error, shown_id)
        if relayed is None:
            head = b"content-type: application/json\r\nx-request-id: %b\r\n" % shown_id.encode()
        else:
            head = relayed.head(b"application/json")
        if isinstance(error, LimitReached):
            head += error.standing.lines()
        head += b"".join([f"{name}: {value}\r\n".encode() for name, value in more.items()])
        exchange.respond(status, head, _encode(body))


def _content_length(value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise Rejected("Content-Length is not a number.", code="invalid_content_length")
    return int(value)


def _dollars(price_e10: int) -> str:
    """USD a million tokens, exact, from 10⁻¹⁰ USD a token."""
    whole, rest = divmod(price_e10, 10_000)
    return f"{whole}.{rest:04d}".rstrip("0").ljust(len(str(whole)) + 3, "0")

"""The OpenAI surface under `/v1`, as one ASGI handler: no framework between the socket and the relay."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

import msgspec

from api.errors import error_body
from api.inference.auth import KeyRing
from api.inference.calls import PATHS, Call, check_fit, read_call
from api.inference.limits import Limits
from api.inference.metering import UsageLog
from api.inference.observing import Observer
from api.inference.proxy import Headers, Receive, Relay, Relayed, Send, now_ms
from api.inference.router import RouteTable
from crosslogic.domain.catalog import Catalog, Model
from crosslogic.domain.errors import CrossLogicError, Rejected, Unavailable
from crosslogic.domain.ids import REQUEST, uuid7
from crosslogic.domain.keys import Action, role_allows
from crosslogic.domain.tenancy import Principal
from crosslogic.domain.usage import Intent, list_price_microdollars

log = logging.getLogger("crosslogic.inference")

LONGEST_CLIENT_REQUEST_ID = 128
# What the whole request may take to arrive; slower clients hold memory for nothing.
BODY_TIMEOUT_S = 60.0

Scope = Mapping[str, Any]
ReadUsage = Callable[[Principal, Mapping[str, str]], Awaitable[dict[str, Any]]]

_encode = msgspec.json.Encoder().encode


class _ClientLeft(Exception):
    """The client hung up before its request was complete: there is nobody to answer."""


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
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._table = table
        self._relay = relay
        self._usage_log = usage_log
        self._observer = observer
        self._read_usage = read_usage
        self._max_body_bytes = max_body_bytes
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
        self._relay.catalog = catalog

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request whose path starts with `/v1`."""
        started_at = self._loop.time()
        request_id = uuid7(now_ms(), int.from_bytes(os.urandom(10), "big"))
        shown_id = REQUEST.show(request_id)
        authorization = region = client_request_id = b""
        length = -1
        relayed: Relayed | None = None
        try:
            for name, value in scope["headers"]:
                if name == b"authorization":
                    authorization = value
                elif name == b"content-length":
                    length = _content_length(value)
                elif name == b"x-crosslogic-region":
                    region = value
                elif name == b"x-request-id":
                    client_request_id = value
            principal = await self._keys.authenticate(authorization)
            path: str = scope["path"]
            if path not in PATHS:
                await self._look_up(path, scope, principal, shown_id, send)
                return
            if scope["method"] != "POST":
                raise Rejected(f"Use POST for {path}.", status=405, code="method_not_allowed")
            if not role_allows(principal.role, Action.INFER):
                raise Rejected(
                    f"A {principal.role} key may not run models; use a developer key.",
                    status=403,
                    code="role_not_allowed",
                )
            raw = await self._read_body(receive, length)
            call = read_call(path, raw, scope["query_string"], region.decode("latin-1"))
            model = self._resolve(call, principal)
            relayed = await self._admit(request_id, shown_id, call, model, principal, client_request_id, started_at)
            await self._relay.run(relayed, receive, send)
        except _ClientLeft:
            pass
        except CrossLogicError as error:
            if relayed is None:
                self._observer.refused(getattr(error, "code", "internal"))
            await self._send_error(error, shown_id, relayed, send)
        except Exception as error:
            log.exception("request %s failed by our own fault", shown_id)
            if relayed is None or not relayed.has_begun:
                await self._send_error(error, shown_id, relayed, send)
            else:
                raise

    async def _admit(
        self,
        request_id: Any,
        shown_id: str,
        call: Call,
        model: Model,
        principal: Principal,
        client_request_id: bytes,
        started_at: float,
    ) -> Relayed:
        """Place the hold, then write the intent: from here on the request leaves exactly one usage record."""
        regions = self.catalog.regions
        plan = regions.plan(regions.wish(call.region) if call.region else None, principal.region_preferences)
        multiplier_bp = regions.regions[plan.home].multiplier_bp
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
            client_request_id=client_request_id[:LONGEST_CLIENT_REQUEST_ID].replace(b"\0", b"").decode("latin-1"),
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
        hold = await self._limits.place(shown_id, principal, tokens, spend)
        try:
            self._usage_log.intend(intent)
        except BaseException:
            await self._limits.release(hold)
            raise
        return Relayed(request_id, shown_id, call, model, plan, hold, intent, started_at)

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

    async def _read_body(self, receive: Receive, length: int) -> bytes:
        most = self._max_body_bytes
        if length > most:
            raise self._too_large()
        body = b""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeft
                    body = message.get("body", b"")
                    size += len(body)
                    if size > most:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
                    parts.append(body)
        except TimeoutError as error:
            raise Rejected("The body did not arrive in time.", status=408, code="body_timeout") from error
        return b"".join([*parts, body]) if parts else body

    def _too_large(self) -> Rejected:
        return Rejected(f"The body is larger than {self._max_body_bytes} bytes.", status=413, code="body_too_large")

    # Look-ups

    async def _look_up(self, path: str, scope: Scope, principal: Principal, shown_id: str, send: Send) -> None:
        if path == "/v1/models" or path.startswith("/v1/models/") or path == "/v1/usage":
            if scope["method"] not in ("GET", "HEAD"):
                raise Rejected(f"Use GET for {path}.", status=405, code="method_not_allowed")
        else:
            raise Rejected(f"There is nothing at {path[:200]}. See GET /openapi.json.", status=404, code="not_found")
        if path == "/v1/usage":
            if not role_allows(principal.role, Action.READ_USAGE):
                raise Rejected("This key may not read usage.", status=403, code="role_not_allowed")
            values = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=32)
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
        await _send_json(200, answer, [(b"x-request-id", shown_id.encode())], send)

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

    async def _send_error(self, error: Exception, shown_id: str, relayed: Relayed | None, send: Send) -> None:
        status, body, more = error_body(error, shown_id)
        headers: Headers = [(b"x-request-id", shown_id.encode())]
        if relayed is not None:
            headers = [header for header in relayed.headers(b"") if header[0] != b"content-type"]
        headers.extend((name.lower().encode(), value.encode()) for name, value in more.items())
        await _send_json(status, body, headers, send)


async def _send_json(status: int, document: Any, headers: Headers, send: Send) -> None:
    body = _encode(document)
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def _content_length(value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise Rejected("Content-Length is not a number.", code="invalid_content_length")
    return int(value)


def _dollars(price_e10: int) -> str:
    """USD a million tokens, exact, from 10⁻¹⁰ USD a token."""
    whole, rest = divmod(price_e10, 10_000)
    return f"{whole}.{rest:04d}".rstrip("0").ljust(len(str(whole)) + 3, "0")

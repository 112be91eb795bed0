"""The local cloud as a cloud: machines of the development machine, over its HTTP API."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx

from crosslogic.contracts.node import Machine, NodeSpec
from crosslogic.domain.credentials import node_credential
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.settings import Settings

_TIMEOUT_S = 5.0  # It runs on this machine and answers at once unless it is told to hang.


class LocalCloud:
    """The `Cloud` of `activities.cloud`. Every call is idempotent and raises Unavailable when no answer came."""

    def __init__(self, url: str, token: str, node_secret: str, timeout_s: float = _TIMEOUT_S) -> None:
        self._node_secret = node_secret
        self._http = httpx.AsyncClient(
            base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=timeout_s, trust_env=False
        )

    @classmethod
    def of(cls, settings: Settings) -> LocalCloud:
        """The client that the settings describe."""
        token, node_secret = settings.local_cloud_token, settings.node_secret
        return cls(
            settings.local_cloud_url,
            token.get_secret_value() if token else "",
            node_secret.get_secret_value() if node_secret else "",
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ensure(self, spec: NodeSpec) -> None:
        """Order the machine `spec.cluster` unless it exists. Raises Rejected (no_capacity) if it cannot be had now."""
        order = {
            "model": spec.model,
            "kind": "embedding" if spec.kind == "embedding" else "chat",
            "region": spec.region,
            "credential": node_credential(self._node_secret, spec.node_id),
            "engine_args": list(spec.serves.engine_args),
        }
        await self._call("PUT", f"/machines/{quote(spec.cluster, safe='')}", order)

    async def find(self, cluster: str) -> Machine | None:
        """What the cloud says of a machine; None if it knows none of that name."""
        try:
            return _machine(await self._call("GET", f"/machines/{quote(cluster, safe='')}"))
        except Rejected as error:
            if error.code == "unknown_machine":
                return None
            raise

    async def list_all(self, prefix: str) -> list[Machine]:
        """Every machine whose name starts with `prefix`. The list may lag behind orders and ends."""
        body = await self._call("GET", f"/machines?prefix={quote(prefix, safe='')}")
        return [_machine(machine) for machine in body["machines"]]

    async def end(self, cluster: str) -> None:
        """Order a machine's end; also of one that has ended or was never there."""
        await self._call("DELETE", f"/machines/{quote(cluster, safe='')}")

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"The local cloud did not answer {method} {path} ({type(error).__name__}). See logs/local-cloud.log in "
                "the state directory."
            ) from error
        if response.is_success:
            return response.json()
        code, message = _error_of(response)
        # A refused token is our own configuration: the order is not wrong, and works once that is mended.
        if response.status_code >= 500 or response.status_code == 401:
            raise Unavailable(f"The local cloud answered {response.status_code} to {method} {path}: {message}")
        raise Rejected(message, status=response.status_code, code=code)


def _machine(body: dict[str, Any]) -> Machine:
    return Machine(body["cluster"], body["status"], body["endpoint"], body["reason"])


def _error_of(response: httpx.Response) -> tuple[str, str]:
    try:
        error = response.json()["error"]
        return error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return "invalid_order", response.text[:200]

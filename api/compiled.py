"""`uvicorn --http api.compiled:HttpProtocol`: the API's protocol, compiled where `./run compile` has built it."""

from __future__ import annotations

import logging

from crosslogic import compiled

IS_COMPILED = compiled.use()

from api.inference.server import HttpProtocol  # noqa: E402 - the compiled one, if there is one.

__all__ = ["IS_COMPILED", "HttpProtocol"]

logging.getLogger("crosslogic.api").info("the hot path runs %s", "compiled" if IS_COMPILED else "interpreted")

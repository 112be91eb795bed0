"""`uvicorn api.compiled:app --http api.compiled:HttpProtocol`: the API, its hot path compiled where that was built."""

from __future__ import annotations

import logging

from crosslogic import compiled

IS_COMPILED = compiled.use()

from api.app import app  # noqa: E402 - after the compiled modules are in place.
from api.inference.server import HttpProtocol  # noqa: E402

__all__ = ["IS_COMPILED", "HttpProtocol", "app"]

logging.getLogger("crosslogic.api").info("the hot path runs %s", "compiled" if IS_COMPILED else "interpreted")

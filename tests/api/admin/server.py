"""The admin API alone, on a real socket: the router and its error bodies, over Postgres and perhaps Temporal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import AsyncGenerator, Generator
from functools import partial

import uvicorn
from fastapi import APIRouter, FastAPI

from api import admin, error_handlers
from api.admin.context import AdminContext
from crosslogic.clients import temporal
from crosslogic.settings import Settings
from crosslogic.store import database

TOKEN = "adm_a-token-for-tests-of-the-admin-api"


@contextlib.contextmanager
def serving(settings: Settings, *beside: APIRouter) -> Generator[str]:
    """The URL of the admin API and of what stands beside it, served from a thread until the block ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        pool = await database.connect(settings)
        app.state.admin = AdminContext(settings, pool, partial(temporal.connect, settings))
        yield
        pool.terminate()

    app = FastAPI(lifespan=lifespan)
    error_handlers.install(app)
    app.include_router(admin.router)
    for router in beside:
        app.include_router(router)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level=logging.INFO))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"

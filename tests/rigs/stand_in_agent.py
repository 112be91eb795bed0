"""A node's agent as far as a rented machine can tell: the same environment, registration, engine and relay; no TLS.

Standard library only. Runs as `python3 crosslogic-agent.pyz`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import urllib.request


def phone_home() -> None:
    """Register: who this is and where it listens."""
    said = {
        "node_id": os.environ["CROSSLOGIC_AGENT_NODE_ID"],
        "join_token": os.environ["CROSSLOGIC_AGENT_JOIN_TOKEN"],
        "engine": os.environ["CROSSLOGIC_AGENT_ENGINE"],
        "listen": os.environ["CROSSLOGIC_AGENT_LISTEN"],
    }
    url = os.environ["CROSSLOGIC_AGENT_CONTROL_URL"] + "/agent/register"
    request = urllib.request.Request(url, json.dumps(said).encode(), {"content-type": "application/json"})
    urllib.request.urlopen(request, timeout=10).close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        engine = await asyncio.open_connection("127.0.0.1", int(os.environ["CROSSLOGIC_AGENT_ENGINE_PORT"]))
    except OSError:
        writer.close()
        return
    await asyncio.gather(pump(reader, engine[1]), pump(engine[0], writer))


async def main() -> None:
    host, _, port = os.environ["CROSSLOGIC_AGENT_LISTEN"].rpartition(":")
    engine = await asyncio.create_subprocess_exec(*shlex.split(os.environ["CROSSLOGIC_AGENT_ENGINE_COMMAND"]))
    await asyncio.start_server(relay, host, int(port))
    with contextlib.suppress(OSError):
        await asyncio.to_thread(phone_home)
    raise SystemExit(await engine.wait())


if __name__ == "__main__":
    asyncio.run(main())

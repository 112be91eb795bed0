"""A stub engine that costs next to nothing: what vLLM sends, byte for byte in shape, from memory.

`python -m bench.engine --first-port N` serves on N and the ports behind it, all in one process. A chat completion is
answered at once; a streamed one sends an event every 5 ms, `max_tokens` of them. A `seed` is the pace in milliseconds
instead: a field of OpenAI's own, so that every gateway passes it on.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
from collections.abc import Sequence
from typing import cast

import httptools
import msgspec
import uvloop

PORTS = 16
PACE_S = 0.005
PROMPT_TOKENS = 24
ANSWER_TOKENS = 16
LONGEST_STREAM = 100_000  # tokens

_ID = "chatcmpl-9f1c2f0a6d5e4b7c8a90b1c2d3e4f506"
_CREATED = 1764000000
_WORDS = (
    " the",
    " of",
    " model",
    " and",
    " answer",
    " in",
    " to",
    " node",
    " which",
    " is",
    " a",
    " reply",
    ",",
    " so",
)
_TEXT = "A control plane decides; the data plane only carries what was decided."


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Asked(msgspec.Struct):
    """What of a request decides the answer."""

    model: str = ""
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    seed: int | None = None
    max_completion_tokens: int | None = None  # What SGLang's router makes of it.


_read = msgspec.json.Decoder(_Asked).decode
_encode = msgspec.json.Encoder().encode


def usage(completion_tokens: int) -> dict[str, object]:
    """The usage that the engine reports."""
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
    }


def answer(path: str, model: str) -> bytes:
    """The body of an answer that is not streamed."""
    is_chat = path.endswith("/chat/completions")
    message: dict[str, object] = {"role": "assistant", "content": _TEXT, "tool_calls": None}
    said: dict[str, object] = {"message": message} if is_chat else {"text": _TEXT}
    return _encode(
        {
            "id": _ID if is_chat else _ID.replace("chatcmpl", "cmpl"),
            "object": "chat.completion" if is_chat else "text_completion",
            "created": _CREATED,
            "model": model,
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
            "usage": usage(ANSWER_TOKENS),
            "prompt_logprobs": None,
        }
    )


def event(path: str, model: str, text: str, *, finish: str | None = None, is_first: bool = False) -> bytes:
    """One event of a stream."""
    is_chat = path.endswith("/chat/completions")
    said: dict[str, object] = {"text": text}
    if is_chat:
        said = {"delta": {"role": "assistant", "content": ""} if is_first else {"content": text}}
    document = {
        "id": _ID if is_chat else _ID.replace("chatcmpl", "cmpl"),
        "object": "chat.completion.chunk" if is_chat else "text_completion",
        "created": _CREATED,
        "model": model,
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish, "stop_reason": None}],
    }
    return b"data: %b\n\n" % _encode(document)


def usage_event(path: str, model: str, completion_tokens: int) -> bytes:
    """The last event before `[DONE]`, for those who ask for usage."""
    is_chat = path.endswith("/chat/completions")
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    document = {"id": _ID, "object": kind, "created": _CREATED, "model": model, "choices": ()}
    return b"data: %b\n\n" % _encode({**document, "usage": usage(completion_tokens)})


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Script:
    """Everything that is sent for one path and model, made once."""

    __slots__ = ("_model", "_path", "_usage", "first", "last", "steps", "whole")

    def __init__(self, path: str, model: str) -> None:
        self._path = path
        self._model = model
        body = answer(path, model)
        head = b"HTTP/1.1 200 OK\r\ndate: Mon, 24 Nov 2025 16:00:00 GMT\r\nserver: uvicorn\r\n"
        self.whole = head + b"content-length: %d\r\ncontent-type: application/json\r\n\r\n%b" % (len(body), body)
        first = event(path, model, "", is_first=True)
        stream = b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        self.first = head + stream + _chunk(first)
        self.steps = [_chunk(event(path, model, word)) for word in _WORDS]
        self.last = _chunk(event(path, model, "", finish="length"))
        self._usage: dict[int, bytes] = {}

    def end(self, completion_tokens: int, *, with_usage: bool) -> bytes:
        """What follows the last token."""
        done = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        if not with_usage:
            return self.last + done
        told = self._usage.get(completion_tokens)
        if told is None:
            told = self._usage[completion_tokens] = _chunk(usage_event(self._path, self._model, completion_tokens))
        return self.last + told + done


class Engine(asyncio.Protocol):
    """One connection to the engine. Requests on it are answered in turn; clients do not pipeline."""

    __slots__ = (
        "_at",
        "_body",
        "_loop",
        "_pace_s",
        "_parser",
        "_path",
        "_scripts",
        "_sent",
        "_timer",
        "_transport",
        "_wanted",
    )

    def __init__(self, scripts: dict[tuple[str, str], Script]) -> None:
        self._scripts = scripts
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._path = b""
        self._body = b""
        self._timer: asyncio.TimerHandle | None = None
        self._at = 0.0
        self._pace_s = PACE_S
        self._sent = 0
        self._wanted: tuple[Script, int, bool] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop: an answer that nobody wants any more ends."""
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            if self._transport is not None:
                self._transport.close()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._path = self._body = b""

    def on_url(self, url: bytes) -> None:
        """Called by the parser, with a piece of it."""
        self._path += url

    def on_body(self, body: bytes) -> None:
        """Called by the parser, with a piece of it."""
        self._body += body

    def on_message_complete(self) -> None:
        """Called by the parser."""
        path = self._path.partition(b"?")[0].decode("latin-1")
        if not self._body:
            self._look_up(path)
            return
        try:
            asked = _read(self._body)
        except msgspec.DecodeError:
            self._send(400, b'{"error":"bad JSON"}')
            return
        script = self._scripts.get((path, asked.model))
        if script is None:
            script = self._scripts[path, asked.model] = Script(path, asked.model)
        if not asked.stream:
            self._write(script.whole)
            return
        wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
        tokens = asked.max_completion_tokens or asked.max_tokens or ANSWER_TOKENS
        self._wanted = (script, min(tokens, LONGEST_STREAM), wants_usage)
        self._sent = -1
        self._pace_s = asked.seed / 1000 if asked.seed else PACE_S
        self._at = self._loop.time() + PACE_S
        self._timer = self._loop.call_at(self._at, self._step)

    def _step(self) -> None:
        """Send the next event: the role, then the tokens; with the last one the end."""
        assert self._wanted is not None
        script, tokens, wants_usage = self._wanted
        self._sent += 1
        if self._sent == 0:
            self._write(script.first)
        else:
            step = script.steps[self._sent % len(script.steps)]
            if self._sent == tokens:
                self._write(step + script.end(tokens, with_usage=wants_usage))
                return
            self._write(step)
        self._at += self._pace_s
        self._timer = self._loop.call_at(self._at, self._step)

    def _look_up(self, path: str) -> None:
        if path == "/v1/models":
            card = {
                "id": "llama-3-8b",
                "object": "model",
                "created": _CREATED,
                "owned_by": "vllm",
                "max_model_len": 8192,
            }
            self._send(200, _encode({"object": "list", "data": [card]}))
        elif path in ("/get_model_info", "/model_info", "/server_info", "/get_server_info"):
            # What SGLang's router asks of a worker before it sends it anything.
            self._send(200, b'{"model_path":"llama-3-8b","served_model_name":"llama-3-8b","is_generation":true}')
        else:
            self._send(200 if path in ("/health", "/health_generate", "/ping", "/version") else 404, b"{}")

    def _send(self, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d Stub\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._write(head % (status, len(body)) + body)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def serve(first_port: int, ports: int, tls: ssl.SSLContext | None) -> None:
    """Serve until cancelled."""
    loop = asyncio.get_running_loop()
    scripts: dict[tuple[str, str], Script] = {}
    for port in range(first_port, first_port + ports):
        await loop.create_server(lambda: Engine(scripts), "127.0.0.1", port, ssl=tls, backlog=4096)
    await asyncio.Event().wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run in the foreground."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--first-port", type=int, required=True)
    parser.add_argument("--ports", type=int, default=PORTS)
    parser.add_argument("--certificate", default="", metavar="PEM", help="serve TLS with this certificate and key")
    given = parser.parse_args(arguments)
    tls: ssl.SSLContext | None = None
    if given.certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(given.certificate)
    uvloop.run(serve(given.first_port, given.ports, tls))


if __name__ == "__main__":
    main()

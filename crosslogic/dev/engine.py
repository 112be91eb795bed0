"""One machine of the local cloud: llama.cpp's HTTP server with SmolLM2-135M, whatever model it stands for.

`python -m crosslogic.dev.engine REPORT` reads its order as a JSON object from stdin, because others can see arguments,
serves on 127.0.0.1 until SIGTERM, and writes `{"port": N}` to the file REPORT once it does.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslogic.dev import binaries
from crosslogic.dev.state import is_port_free, write_json

# The package has no types.
_llama: Any = importlib.import_module("xllamacpp")

# One thread each: four engines on two cores answer sooner so than with two threads each, which wait for one another.
_THREADS = 1
# Requests at a time; a further one waits in the engine.
_SLOTS = 4
# All slots share these; one request may use them all. A token's keys and values take 23 kB (30 layers × 2 × 192 × 2 B).
_CHAT_CONTEXT_TOKENS = 4096
# Mean pooling needs a whole input in one micro-batch; 512 tokens is what the embedding model of the catalog takes.
_EMBEDDING_CONTEXT_TOKENS = 512
# Smaller batches than llama.cpp's defaults: as fast on one thread, less memory, and shorter turns between slots.
_CHAT_BATCH_TOKENS = 128
_WARNINGS = 2  # llama.cpp's verbosity: 1 errors, 2 warnings, 3 every request.


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """What to serve as. `port` is a wish: another one is taken if somebody has it."""

    model: str
    kind: str
    credential: str
    port: int = 0
    grammar: str = ""

    @classmethod
    def read(cls, body: dict[str, Any]) -> EngineOrder:
        """The order in its JSON form. Of llama.cpp's command line it knows `--grammar`; exits for anything else."""
        arguments: list[str] = body.get("engine_args", [])
        if arguments and (arguments[0] != "--grammar" or len(arguments) != 2):
            sys.exit(f"error: invalid argument: {' '.join(arguments)[:200]}")
        return cls(
            body["model"], body["kind"], body["credential"], body.get("port", 0), arguments[1] if arguments else ""
        )


def parameters(order: EngineOrder) -> Any:
    """The order in llama.cpp's terms."""
    params = _llama.CommonParams()
    params.model.path = str(binaries.weights())
    params.model_alias = {order.model}  # Without one, answers name the file.
    params.api_keys = [order.credential]
    params.hostnames = ["127.0.0.1"]
    params.port = order.port if order.port and is_port_free(order.port) else 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _THREADS
    params.n_parallel = _SLOTS
    params.cache_ram_mib = 0  # Slots keep their prompts; a second cache beside them would grow to 8 GB.
    params.endpoint_metrics = params.endpoint_slots = True
    params.ui = False
    params.verbosity = _WARNINGS
    if order.kind == "embedding":
        params.embedding = True
        params.pooling_type = _llama.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        params.n_ctx = _EMBEDDING_CONTEXT_TOKENS * _SLOTS
        params.n_batch = params.n_ubatch = _EMBEDDING_CONTEXT_TOKENS
    else:
        if order.grammar:
            # Holds for requests that bring none of their own.
            params.sampling.grammar = _llama.CommonGrammar(
                _llama.common_grammar_type.COMMON_GRAMMAR_TYPE_USER, order.grammar
            )
        params.n_ctx = _CHAT_CONTEXT_TOKENS
        params.kv_unified = True
        params.n_batch = params.n_ubatch = _CHAT_BATCH_TOKENS
    return params


def main() -> None:
    """Serve the order on stdin until SIGTERM."""
    ended = threading.Event()

    def end(_number: int, _frame: object) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    order = EngineOrder.read(json.load(sys.stdin))
    os.nice(5)  # The machine belongs to the control plane first; a rented node would have its own.
    server = _llama.Server(parameters(order))
    port = int(str(server.listening_address).rpartition(":")[2])
    write_json(Path(sys.argv[1]), {"port": port})
    print(f"serving {order.model} on port {port}", flush=True)
    ended.wait()
    # The server's threads may hold a request; a machine that is switched off does not wait for it.
    os._exit(0)


if __name__ == "__main__":
    main()

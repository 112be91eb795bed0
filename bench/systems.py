"""The systems under test: each is started once for a run, answers on a port, and says which processes are its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.engine import PORTS
from bench.load import Target
from bench.peers import MODEL, STREAMS, Peer, version
from bench.processes import BenchError, Cores, Program
from bench.seed import Seeded, seed
from crosslogic.bootstrap import ROOT
from crosslogic.dev.parts import Part
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.state import free_port, is_port_free
from crosslogic.dev.valkey import Valkey
from crosslogic.settings import child_environment

START_S = 60.0
# Below the range that Linux gives to outgoing connections.
FIRST_ENGINE_PORT = 20_000
TLS_MODEL = "mistral-7b"


@dataclass(slots=True)
class Running:
    """One system that answers. `program` is what is charged with its CPU and memory; `beside` what serves it."""

    name: str
    title: str
    target: Target
    program: Program | None
    beside: Mapping[str, Program] = field(default_factory=dict[str, Program])
    asked: int = 0  # Requests that were answered before it counted as ready.
    streams: int = STREAMS


@dataclass(slots=True)
class Engines:
    """The stub engines: in plain HTTP, and in TLS with the certificate that signed itself."""

    program: Program
    first_port: int
    tls_program: Program | None = None
    tls_first_port: int = 0
    certificate: Path | None = None

    @property
    def ports(self) -> range:
        """Of the engines in plain HTTP."""
        return range(self.first_port, self.first_port + PORTS)

    def stop(self) -> None:
        """Stop both."""
        self.program.stop()
        if self.tls_program is not None:
            self.tls_program.stop()


@dataclass(frozen=True, slots=True)
class Bed:
    """Where everything of one run lives."""

    folder: Path
    cores: Cores

    def log(self, name: str) -> Path:
        """The log of one program."""
        return self.folder / "logs" / f"{name}.log"


def start_engines(bed: Bed, *, with_tls: bool) -> Engines:
    """Both engines, on the other core."""
    program, first_port = _start_engine(bed, "engine", FIRST_ENGINE_PORT)
    engines = Engines(program, first_port)
    if with_tls:
        engines.certificate = make_certificate(bed.folder)
        try:
            engines.tls_program, engines.tls_first_port = _start_engine(
                bed, "engine-tls", first_port + PORTS, "--certificate", str(engines.certificate)
            )
        except BaseException:
            program.stop()
            raise
    return engines


def _start_engine(bed: Bed, name: str, at_least: int, *more: str) -> tuple[Program, int]:
    first = at_least
    while not all(is_port_free(port) for port in range(first, first + PORTS)):
        first += PORTS
    command = [sys.executable, "-m", "bench.engine", "--first-port", str(first), *more]
    program = Program(name, command, (bed.cores.rest,), bed.log(name), environment=child_environment(), cwd=ROOT)
    try:
        program.wait_until(lambda: listens(first + PORTS - 1), START_S)
    except BaseException:
        program.stop()
        raise
    return program, first


def make_certificate(folder: Path) -> Path:
    """A throw-away certificate for localhost with its key, in one file. Raises BenchError without `openssl`."""
    path = folder / "engine.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    key, certificate = folder / "engine.key", folder / "engine.crt"
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(
            f"TLS to the engines needs the program openssl: {error}. Leave it out with --no-tls."
        ) from error
    path.touch(0o600)
    path.write_text(certificate.read_text() + key.read_text())
    return path


def listens(port: int) -> bool:
    """Does somebody accept connections there?"""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers(target: Target) -> bool:
    """Does a chat completion come through? A gateway that listens may not know its engines yet."""
    head, _, body = target.whole().partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    request = urllib.request.Request(f"http://127.0.0.1:{target.port}{target.path}", data=body, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return b"usage" in answer.read()
    except (OSError, urllib.error.URLError):
        return False


def start_nginx(bed: Bed, engines: Engines) -> Running:
    """nginx as a dumb proxy: round robin, kept-alive connections to the engines, no buffering, nothing logged."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
    if program is None:
        raise BenchError("nginx is not installed (Debian: apt-get install nginx-light).")
    folder = bed.folder / "nginx"
    folder.mkdir()
    port = free_port()
    upstream = "\n".join(f"    server 127.0.0.1:{engine};" for engine in engines.ports)
    temporary = "\n".join(
        f"  {name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(f"""
{user}
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 19000; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 3600s;
{temporary}
  upstream engines {{
{upstream}
    keepalive 512;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engines;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
""")
    command = [program, "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", "stderr"]
    return _ready(
        Running(
            "nginx",
            "nginx, dumb proxy",
            Target(port),
            Program("nginx", command, (bed.cores.gateway,), bed.log("nginx")),
        )
    )


def _ready(running: Running, times: int = 1) -> Running:
    """Wait until so many requests have been answered."""
    program = running.program
    assert program is not None
    try:
        for _ in range(times):
            program.wait_until(lambda: answers(running.target), START_S)
            running.asked += 1
    except BaseException:
        program.stop()
        raise
    return running


def start_peer(bed: Bed, engines: Engines, peer: Peer) -> Running:
    """A peer, installed if need be. Raises BenchError when it cannot be installed or does not answer."""
    folder = bed.folder / peer.name
    folder.mkdir()
    port = free_port()
    start = peer.prepare(port, [f"http://127.0.0.1:{engine}" for engine in engines.ports], folder)
    environment = child_environment(**start.environment)
    program = Program(
        peer.name, start.command, (bed.cores.gateway,), bed.log(peer.name), environment=environment, cwd=folder
    )
    target = Target(port, MODEL, headers=start.headers)
    title = peer.title.format(version(peer.name))
    return _ready(Running(peer.name, title, target, program, streams=peer.streams))


def api_command(port: int, workers: int) -> list[str]:
    """How the API is started, as `./run` does it."""
    command = [sys.executable, "-m", "uvicorn", "api.app:app", "--http", "api.inference.server:HttpProtocol"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--no-access-log", "--no-server-header", "--timeout-graceful-shutdown", "5", "--backlog", "4096"]
    # As nginx here: connections that are silent for a while are what is measured.
    command += ["--timeout-keep-alive", "3600"]
    return [*command, "--workers", str(workers)] if workers > 1 else command


class Stack:
    """Our gateway's servers, started once for a run: a real Postgres and a real Valkey, migrated and seeded."""

    def __init__(self, bed: Bed, engines: Engines) -> None:
        self._bed = bed
        self._engines = engines
        self._programs: list[Program] = []
        folder = bed.folder / "stack"
        folder.mkdir()
        self.postgres = Postgres(folder / "postgres", free_port(), secrets.token_hex(16))
        self.valkey = Valkey(folder / "valkey", free_port(), secrets.token_hex(16))
        self.state_dir = folder
        self.seeded: Seeded
        self.beside: dict[str, Program] = {}

    def start(self) -> None:
        """Start both servers and seed them."""
        for part in (self.postgres, self.valkey):
            self.beside[part.name] = self._serve(part)
        engines = {MODEL: [f"http://127.0.0.1:{port}" for port in self._engines.ports]}
        if self._engines.tls_program is not None:
            ports = range(self._engines.tls_first_port, self._engines.tls_first_port + PORTS)
            engines[TLS_MODEL] = [f"https://localhost:{port}" for port in ports]
        self.seeded = asyncio.run(seed(self.postgres.url, engines))

    def start_api(self, name: str, workers: int = 1) -> Running:
        """The gateway with everything on. Two processes share one port and have a core each."""
        port = free_port()
        environment = child_environment(
            CROSSLOGIC_MODE="dev",
            CROSSLOGIC_STATE_DIR=str(self.state_dir),
            CROSSLOGIC_DATABASE_URL=self.postgres.url,
            CROSSLOGIC_REDIS_URL=self.valkey.url,
            CROSSLOGIC_LOG_LEVEL="warning",
            PYTHONUNBUFFERED="1",
        )
        if self._engines.certificate is not None:
            # What verifies the engines: our gateway takes no certificate on trust.
            environment["SSL_CERT_FILE"] = str(self._engines.certificate)
        program = Program(
            name,
            api_command(port, workers),
            (self._bed.cores.gateway,) if workers == 1 else (self._bed.cores.gateway, self._bed.cores.second),
            self._bed.log(name),
            environment=environment,
            cwd=ROOT,
        )
        self._programs.append(program)
        target = Target(port, MODEL, headers={"Authorization": f"Bearer {self.seeded.secret}"})
        title = "**CrossLogic, everything on**" + ("" if workers == 1 else f", {workers} processes")
        # Connections go to any process: all have to be ready.
        return _ready(Running(name, title, target, program, self.beside), 1 if workers == 1 else 20 * workers)

    def over_tls(self, api: Running) -> Running:
        """The same gateway, asked for the model whose engines speak TLS."""
        target = replace(api.target, model=TLS_MODEL)
        running = Running(f"{api.name}-tls", "CrossLogic, TLS to the engines", target, api.program, api.beside)
        return _ready(running)

    def stop(self) -> None:
        """Stop what was started, servers last."""
        for program in reversed(self._programs):
            program.stop()
        self.postgres.forget()

    def _serve(self, part: Part) -> Program:
        launch = part.prepare()
        program = Program(
            part.name,
            launch.command,
            (self._bed.cores.rest,),
            self._bed.log(part.name),
            environment=launch.environment,
            cwd=launch.cwd,
            user=launch.user,
            stop_signal=part.stop_signal,
        )
        self._programs.append(program)
        program.wait_until(lambda: asyncio.run(part.is_ready()), START_S)
        return program

"""`python -m bench.gateways`: our gateway with everything on beside its peers, in one interleaved run."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import gc
import json
import math
import os
import platform
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import measure, report
from bench.engine import ANSWER_TOKENS
from bench.load import Run, Target
from bench.measure import Figures, Lengths
from bench.peers import PEERS, STREAMS
from bench.processes import BenchError, Cores
from bench.proof import Proof, Sent, prove
from bench.systems import Bed, Engines, Running, Stack, start_engines, start_nginx, start_peer
from crosslogic.bootstrap import ROOT
from crosslogic.dev.postgres import Postgres

STATE = ROOT / ".crosslogic-bench"
SYSTEMS = ("nginx", *(peer.name for peer in PEERS), "ours")
# Another program at work on either core makes every figure worse than it is.
MOST_LOAD = 0.5
MOST_BACKGROUND = 0.02
# What a soak may add once it is warm: the allocator's own ups and downs.
SOAK_WARM_SHARE = 0.2
SOAK_GROWTH_MIB = 8.0

Measure = Callable[[Running], tuple[Figures, Run]]


class Gateways:
    """One run: starts the systems, measures them round by round, proves, reports."""

    def __init__(self, bed: Bed, lengths: Lengths, rounds: int, *, with_tls: bool) -> None:
        self._bed = bed
        self._lengths = lengths
        self._rounds = rounds
        self._engines: Engines = start_engines(bed, with_tls=with_tls)
        self._stack: Stack | None = None
        self._systems: list[Running] = []
        self._sent = Sent()
        self._figures: dict[str, list[Figures]] = {}
        self._crowds: dict[str, Figures] = {}
        self._scale: dict[str, list[Figures]] = {}
        self._titles: dict[str, str] = {}
        self._missing: dict[str, str] = {}
        self._warnings: list[str] = []

    def start(self, names: Sequence[str]) -> None:
        """Start the systems; a peer that cannot be is left out and said to be."""
        load = os.getloadavg()[0]
        if load > MOST_LOAD:
            self._warn(f"the machine is not idle: load average {load:.1f} at the start")
        self._add(Running(report.DIRECT, "the engine alone", Target(self._engines.first_port), None))
        for name in names:
            began = time.monotonic()
            try:
                self._start(name)
            except BenchError as error:
                if name == report.OURS:
                    raise
                self._missing[name] = str(error)
                self._warn(f"{name} is left out: {error}")
            else:
                _say(f"started {name}  {time.monotonic() - began:.1f} s")
        share = measure.background(self._systems)
        if share > MOST_BACKGROUND:
            self._warn(f"with nobody asking, the systems use {100 * share:.1f} % of a core together")

    def _start(self, name: str) -> None:
        if name == "nginx":
            self._add(start_nginx(self._bed, self._engines))
        elif name == report.OURS:
            self._stack = Stack(self._bed, self._engines)
            self._stack.start()
            api = self._stack.start_api(name)
            self._add(api)
            if self._engines.tls_program is not None:
                self._add(self._stack.over_tls(api))
        else:
            self._add(start_peer(self._bed, self._engines, next(peer for peer in PEERS if peer.name == name)))

    def _add(self, system: Running) -> None:
        self._systems.append(system)
        self._titles[system.name] = system.title
        self._figures[system.name] = []
        self._count_asked(system)

    def _count_asked(self, system: Running) -> None:
        """What was asked to find out whether it is ready was answered and recorded like anything else."""
        if system.name.startswith(report.OURS):
            self._sent.add(Run(answered=system.asked, completion_tokens=system.asked * ANSWER_TOKENS))

    def measure(self) -> None:
        """All rounds. Within one, each measure goes over all systems before the next, so that drift hits all alike."""
        for number in range(self._rounds):
            # Each round begins with another system, so that none is always the first.
            turn = number % len(self._systems)
            order = self._systems[turn:] + self._systems[:turn]
            for system in order:
                self._figures[system.name].append({})
                self._take(system, lambda one: measure.closed(one, self._lengths))
            for rate in self._lengths.rates:
                for system in order:
                    if rate > measure.MOST_UTILIZATION * self._figures[system.name][-1]["requests_per_s"]:
                        continue
                    self._take(system, lambda one, rate=rate: measure.opened(one, self._lengths, rate))
            for system in order:
                self._take(system, lambda one: measure.streamed(one, self._lengths))
            told = (
                f"{name} {rows[-1]['cpu_us_per_request']:.1f} µs/request {rows[-1]['cpu_us_per_event']:.1f} µs/event"
                for name, rows in self._figures.items()
                if name != report.DIRECT
            )
            _say(f"round {number + 1} of {self._rounds}  " + "  ".join(told))

    def _take(self, system: Running, look: Measure) -> None:
        self._figures[system.name][-1] |= self._seen(system, *look(system))

    def _seen(self, system: Running, figures: Figures, run: Run) -> Figures:
        if system.name.startswith(report.OURS):
            self._sent.add(run)
        if run.failed:
            self._warn(f"{system.name}: {run.failed} of {run.failed + run.answered} failed ({run.first_failure})")
        return figures

    def crowd(self) -> None:
        """Many connections and streams at a time, where they can be carried at all."""
        for system in self._systems:
            # Of what cannot carry the paced streams nothing would be learnt.
            if system.program is None or system.name.endswith("-tls") or system.streams < STREAMS:
                continue
            if math.isnan(self._figures[system.name][-1]["cpu_us_per_event"]):
                continue
            # Both against the same memory: what the first leaves to its allocator the second would use unseen.
            before_mib = system.program.rss_bytes() / 2**20
            figures = self._seen(system, *measure.open_streams(system, before_mib))
            figures |= self._seen(system, *measure.idle(system, before_mib))
            self._crowds[system.name] = figures
            _say(f"crowds of {system.name} done")

    def scale(self) -> None:
        """One process and two, in turns."""
        if self._stack is None:
            return
        one = next(system for system in self._systems if system.name == report.OURS)
        two = self._stack.start_api("ours-two", workers=2)
        self._count_asked(two)
        for _ in range(self._rounds):
            for system in (one, two):
                figures, run = measure.closed(system, self._lengths, 2 * measure.CONNECTIONS)
                self._scale.setdefault(system.name, []).append(self._seen(system, figures, run))
        assert two.program is not None
        two.program.stop()

    def soak(self, requests: int) -> bool:
        """So many requests to our gateway; whether its memory stayed where it was."""
        system = next(system for system in self._systems if system.name == report.OURS)
        sizes: list[tuple[int, float]] = []
        asked = 0
        while asked < requests:
            figures, run = measure.soak(system)
            self._seen(system, figures, run)
            if run.answered == 0:
                raise BenchError(f"nothing is answered any more: {run.first_failure}")
            steps = asked // measure.SOAK_STEP
            asked += run.answered
            if asked // measure.SOAK_STEP > steps or asked >= requests:
                sizes.append((asked, figures["rss_mib"]))
                print(f"{asked:>10,} requests  RSS {figures['rss_mib']:.1f} MiB", flush=True)
        warm = [mib for count, mib in sizes if count >= SOAK_WARM_SHARE * requests]
        growth_mib = warm[-1] - warm[0]
        print(f"growth once warm: {growth_mib:+.1f} MiB over {requests:,} requests")
        return growth_mib <= SOAK_GROWTH_MIB

    def prove(self) -> Proof | None:
        """That everything was on; None without our gateway."""
        if self._stack is None:
            return None
        stack = self._stack
        return asyncio.run(prove(stack.postgres.url, stack.valkey.url, stack.seeded, self._sent))

    def stop(self) -> None:
        """Stop everything, the servers last."""
        for system in self._systems:
            if system.program is not None:
                system.program.stop()
        if self._stack is not None:
            self._stack.stop()
        self._engines.stop()

    def text(self, proof: Proof | None) -> str:
        """The whole report in Markdown."""
        figures = report.medians(self._figures)
        parts = [
            f"{machine_line()}, {self._rounds} rounds, medians.",
            report.cost_table(figures, self._figures, self._titles),
            report.latency_table(figures, self._titles),
        ]
        if self._stack is not None:
            parts.append(report.beside_table(figures, self._titles))
        if self._crowds:
            parts.append(report.crowd_table(self._crowds, self._titles))
        if self._scale:
            titles = {report.OURS: "one process, one core", "ours-two": "two processes, two cores"}
            if self._bed.cores.second == self._bed.cores.rest:
                titles["ours-two"] += ", one of them shared with the load and the servers"
            parts.append(report.scale_table(report.medians(self._scale), titles))
        if proof is not None:
            parts.append(proof.text())
        parts += [f"Left out: {name}: {why.splitlines()[0]}" for name, why in self._missing.items()]
        parts += [f"Warning: {warning}" for warning in self._warnings]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, proof: Proof | None) -> None:
        """The report as Markdown, JSON and a picture."""
        folder.mkdir(parents=True, exist_ok=True)
        figures = report.medians(self._figures)
        document: dict[str, Any] = {
            "machine": machine(),
            "lengths": asdict(self._lengths),
            "titles": self._titles,
            "medians": figures,
            "rounds": self._figures,
            "crowds": self._crowds,
            "scale": self._scale,
            "missing": self._missing,
            "warnings": self._warnings,
            "proof": None if proof is None else asdict(proof),
        }
        (folder / "gateways.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "gateways.md").write_text(self.text(proof))
        report.plot(figures, self._titles, folder / "gateways.png")

    def _warn(self, text: str) -> None:
        self._warnings.append(text)
        _say(f"warning: {text}")


def machine() -> dict[str, str]:
    """What a reader of figures asks about the machine."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def machine_line() -> str:
    """The same in a line."""
    told = machine()
    return f"{told['cpu']}, {told['cores']} cores, Linux {told['kernel']}, Python {told['python']}"


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(home: Path) -> Path:
    """An empty folder for this run; the last run's is deleted. Raises BenchError while another run uses it."""
    home.mkdir(exist_ok=True)
    # Held until this process ends, however it ends.
    descriptor = os.open(home / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BenchError("Another run is under way here; two at once would measure each other.") from error
    folder = home / "run"
    if folder.exists():
        Postgres(folder / "stack" / "postgres", 0, "").forget()
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the protocol. The exit code: 1 when the proof or the soak fails, 2 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateways", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--systems", default=",".join(SYSTEMS), metavar="A,B", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, default=0, help="5; with --quick 2")
    parser.add_argument("--quick", action="store_true", help="short windows, no TLS, crowds or second process")
    parser.add_argument("--no-tls", action="store_true", help="leave TLS to the engines out")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="only N requests to ours, watching its memory")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="write the report, its data and a plot")
    given = parser.parse_args(arguments)
    names = [report.OURS] if given.soak else given.systems.split(",")
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        parser.error(f"there is no system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    is_short = given.quick or given.soak > 0
    lengths = measure.QUICK if given.quick else measure.FULL
    gateways: Gateways | None = None
    # A run that is told to stop stops what it has started.
    signal.signal(signal.SIGTERM, _leave)
    try:
        cores = Cores.choose()
        folder = prepare(STATE)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        os.sched_setaffinity(0, (cores.rest,))
        gc.freeze()
        rounds = given.rounds or (2 if given.quick else 5)
        gateways = Gateways(Bed(folder, cores), lengths, rounds, with_tls=not (is_short or given.no_tls))
        gateways.start(names)
        is_good = True
        if given.soak:
            is_good = gateways.soak(given.soak)
        else:
            gateways.measure()
            if not given.quick:
                gateways.crowd()
                gateways.scale()
        proof = gateways.prove()
        if given.soak:
            print(proof.text() if proof else "")
        else:
            print(gateways.text(proof))
            if given.out is not None:
                gateways.write(given.out, proof)
        return 0 if is_good and (proof is None or not proof.problems) else 1
    except BenchError as error:
        _say(f"Error: {error}")
        return 2
    finally:
        if gateways is not None:
            gateways.stop()


if __name__ == "__main__":
    sys.exit(main())

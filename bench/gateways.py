"""`python -m bench.gateways`: our gateway with everything on beside its peers, in one interleaved run."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import measure, report
from bench.load import Run, Target
from bench.measure import Figures, Lengths
from bench.processes import BenchError, Cores
from bench.proof import Proof, Sent, prove
from bench.systems import Bed, Engines, Running, Stack, start_engines, start_nginx
from crosslogic.bootstrap import ROOT

STATE = ROOT / ".crosslogic-bench"
ALL = ("nginx", "ours")
# Another program at work on either core makes every figure worse than it is.
MOST_LOAD = 0.5


class Gateways:
    """One run: starts the systems, measures them round by round, proves, reports."""

    def __init__(self, bed: Bed, lengths: Lengths, rounds: int, out: Path | None) -> None:
        self._bed = bed
        self._lengths = lengths
        self._rounds = rounds
        self._out = out
        self._systems: list[Running] = []
        self._figures: dict[str, list[Figures]] = {}
        self._sent = Sent()
        self._missing: dict[str, str] = {}
        self._warnings: list[str] = []

    def run(self, names: Sequence[str]) -> int:
        """The exit code: 1 when the proof fails or a request to us did."""
        load = os.getloadavg()[0]
        if load > MOST_LOAD:
            self._warn(f"the machine is not idle: load average {load:.1f} at the start")
        engines = start_engines(self._bed, with_tls=False)
        stack: Stack | None = None
        try:
            self._systems.append(Running(report.DIRECT, "the engine itself", Target(engines.first_port), None))
            for name in names:
                began = time.monotonic()
                try:
                    if name == "ours":
                        stack = Stack(self._bed, engines)
                        stack.start()
                        self._systems.append(stack.start_api())
                    else:
                        self._systems.append(self._start(name, engines))
                except BenchError as error:
                    if name == "ours":
                        raise
                    self._missing[name] = str(error)
                    self._warn(f"{name} is left out: {error}")
                else:
                    _say(f"started {name}  {time.monotonic() - began:.1f} s")
            if stack is not None:
                # What told that it is ready was answered, too.
                self._sent.answered += 1
                self._sent.completion_tokens += 16
            self._measure()
            proof = None
            if stack is not None:
                proof = asyncio.run(prove(stack.postgres.url, stack.valkey.url, stack.seeded, self._sent))
            return self._report(proof)
        finally:
            for system in self._systems:
                if system.program is not None:
                    system.program.stop()
            if stack is not None:
                stack.stop()
            engines.program.stop()

    def _start(self, name: str, engines: Engines) -> Running:
        if name == "nginx":
            return start_nginx(self._bed, engines)
        raise BenchError(f"there is no system named {name!r}")

    def _measure(self) -> None:
        for number in range(self._rounds):
            figures: dict[str, Figures] = {system.name: {} for system in self._systems}
            # Each round begins with another system, so that none is always the first on a warm machine.
            turn = number % len(self._systems)
            order = self._systems[turn:] + self._systems[:turn]
            for system in order:
                figures[system.name] |= self._take(system, *measure.closed(system, self._lengths))
            for rate in self._lengths.rates:
                for system in order:
                    figures[system.name] |= self._take(system, *measure.opened(system, self._lengths, rate))
            for system in order:
                figures[system.name] |= self._take(system, *measure.streamed(system, self._lengths))
                if system.program is not None:
                    figures[system.name]["rss_mib"] = system.program.rss_bytes() / 2**20
            for name, row in figures.items():
                self._figures.setdefault(name, []).append(row)
            _say(
                f"round {number + 1} of {self._rounds}  "
                + "  ".join(
                    f"{name} {row['cpu_us_per_request']:.1f} µs/request {row['cpu_us_per_event']:.1f} µs/event"
                    for name, row in figures.items()
                    if name != report.DIRECT
                )
            )

    def _take(self, system: Running, figures: Figures, run: Run) -> Figures:
        if system.name == "ours":
            self._sent.add(run)
        if run.failed:
            self._warn(f"{system.name}: {run.failed} of {run.failed + run.answered} failed ({run.first_failure})")
        return figures

    def _report(self, proof: Proof | None) -> int:
        figures = report.medians(self._figures)
        titles = {system.name: system.title for system in self._systems}
        text = report.main_table(figures, titles)
        print(text)
        ours = figures.get("ours", {})
        for name in ("valkey", "postgres"):
            if f"{name}_cpu_us_per_request" in ours:
                print(
                    f"Beside ours, on the other core: {name} {ours[f'{name}_cpu_us_per_request']:.1f} µs CPU/request, "
                    f"{ours[f'{name}_cpu_us_per_event']:.1f} µs CPU/event"
                )
        if proof is not None:
            counted = ", ".join(f"{layer} {used:,}" for layer, used in proof.counted_tokens.items())
            print(
                f"Proof: {proof.answered:,} requests answered, {proof.records:,} usage records, {proof.tokens:,} "
                f"tokens; tokens/day counted by layer: {counted}; {proof.nodes} nodes; {proof.holds_left} holds left"
            )
            for problem in proof.problems:
                print(f"  NOT PROVEN  {problem}")
        if self._out is not None:
            self._out.mkdir(parents=True, exist_ok=True)
            document: dict[str, Any] = {
                "machine": machine(),
                "lengths": asdict(self._lengths),
                "medians": figures,
                "rounds": self._figures,
                "missing": self._missing,
                "warnings": self._warnings,
                "proof": None if proof is None else asdict(proof),
            }
            (self._out / "gateways.json").write_text(json.dumps(document, indent=1))
            (self._out / "gateways.md").write_text(text + "\n")
        return 1 if proof is not None and proof.problems else 0

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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the protocol; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateways", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--systems", default=",".join(ALL), metavar="A,B", help=f"of {','.join(ALL)}")
    parser.add_argument("--rounds", type=int, default=0, help="5; with --quick 2")
    parser.add_argument("--quick", action="store_true", help="short windows: to see whether a change helped")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="write table, JSON and plot there")
    given = parser.parse_args(arguments)
    lengths = measure.QUICK if given.quick else measure.FULL
    rounds = given.rounds or (2 if given.quick else 5)
    try:
        cores = Cores.choose()
        if STATE.exists():
            shutil.rmtree(STATE)
        STATE.mkdir()
        os.sched_setaffinity(0, cores.rest)
        gc.freeze()
        return Gateways(Bed(STATE, cores), lengths, rounds, given.out).run(given.systems.split(","))
    except BenchError as error:
        _say(f"Error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Logs: for people or for machines, the same for every process, and without secrets."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from crosslogic.dev.state import free_port
from crosslogic.domain import keys
from crosslogic.settings import Settings, child_environment
from crosslogic.telemetry import configure_logging

ROOT = Path(__file__).resolve().parents[1]
SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.access")


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    others = [(one, one.handlers[:], one.propagate) for one in map(logging.getLogger, SERVERS)]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger, its, propagate in others:
        logger.handlers[:] = its
        logger.propagate = propagate


def settings(**values: Any) -> Settings:
    return Settings(mode="dev", **values)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Every line that was logged, read as JSON."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


class TestJson:
    def test_is_one_object_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging(settings(log_format="json"))
        logging.getLogger("crosslogic.x").warning(
            "node %s is\nleft out", "node_1", extra={"node": "node_1", "tries": 2}
        )
        (line,) = lines(capsys)
        at = datetime.fromisoformat(line.pop("ts"))
        assert datetime.now(UTC) - timedelta(minutes=1) < at <= datetime.now(UTC)
        assert line == {
            "level": "warning",
            "logger": "crosslogic.x",
            "message": "node node_1 is\nleft out",
            "node": "node_1",
            "tries": 2,
        }

    def test_a_traceback_stays_on_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging(settings(log_format="json"))
        try:
            raise ValueError("what went wrong")
        except ValueError:
            logging.getLogger("crosslogic.x").exception("it failed")
        (line,) = lines(capsys)
        assert line["message"] == "it failed"
        assert "ValueError: what went wrong" in line["exception"]

    def test_extra_fields_may_be_anything_but_replace_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging(settings(log_format="json"))
        logging.getLogger("crosslogic.x").info("here", extra={"level": "fake", "ts": 0, "path": Path("a"), "ids": {1}})
        (line,) = lines(capsys)
        assert line["level"] == "info"
        assert line["ts"] != 0
        assert (line["path"], line["ids"]) == ("a", "{1}")

    def test_a_process_writes_nothing_else(self, tmp_path: Path) -> None:
        port = free_port()
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "uvicorn",
                "api.app:app",
                "--http",
                "api.inference.server:HttpProtocol",
                "--port",
                str(port),
            ],
            cwd=ROOT,
            env=child_environment(
                CROSSLOGIC_MODE="dev",
                CROSSLOGIC_LOG_FORMAT="json",
                CROSSLOGIC_START_PATIENCE_S="0",
                CROSSLOGIC_STATE_DIR=str(tmp_path),
                CROSSLOGIC_DATABASE_URL="postgresql://127.0.0.1:1/none",
                CROSSLOGIC_REDIS_URL="redis://127.0.0.1:1/0",
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        written: list[str] = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                written.append(line)
                if "Uvicorn running" in line:
                    process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM)
        finally:
            process.kill()
        assert {json.loads(line)["logger"] for line in written} >= {"uvicorn.error"}


class TestText:
    def test_is_for_people(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging(settings())
        logging.getLogger("crosslogic.x").warning("node %s is left out", "node_1")
        logging.getLogger("uvicorn.error").info("started")
        first, second = capsys.readouterr().err.splitlines()
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING crosslogic\.x node node_1 is left out", first
        )
        assert second.endswith("INFO uvicorn.error started")

    def test_knows_the_least_severe_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging(settings(log_level="warning"))
        logging.getLogger("crosslogic.x").info("too quiet")
        assert capsys.readouterr().err == ""


class TestSecrets:
    @pytest.mark.parametrize("form", ["text", "json"])
    def test_h9_none_gets_through(self, form: str, capsys: pytest.CaptureFixture[str]) -> None:
        secret = keys.mint("prod", os.urandom(keys.RANDOM_BYTES))
        configure_logging(settings(log_format=form))
        logger = logging.getLogger("crosslogic.x")
        logger.warning("it sent %s", secret, extra={"sent": {"authorization": f"Bearer {secret}"}})
        try:
            raise ValueError(secret)
        except ValueError:
            logger.exception("it failed")
        written = capsys.readouterr().err
        assert written.count("sk_prod_…") >= 2
        assert secret[len("sk_prod_") :] not in written

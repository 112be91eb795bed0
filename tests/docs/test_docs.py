"""What the documentation says can be followed: links, commands, JSON, and pages that must agree with the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from crosslogic.agent import config
from crosslogic.cli.commands import app
from crosslogic.contracts.inputs import WORKFLOW_INPUTS, Refused, read_input
from crosslogic.dev import tasks
from crosslogic.dev.reference import METRICS_PAGE, PAGE, metrics_page, settings_page
from crosslogic.domain.node import FINAL_STATES, TRANSITIONS, NodeState
from crosslogic.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "PRD").rglob("*.md")]
)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fences(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page that are in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks and inline code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", text)


def links(page: Path) -> list[str]:
    """What a page links to, other sites excepted."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.DOTALL))
    return [link for link in found if "://" not in link]


@cache
def anchors(page: Path) -> set[str]:
    """The fragments by which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """Every `./run …`, `./test …` and `docker compose run --rm setup …` that a page tells its reader to type."""
    lines = [line for body in fences(page, "sh") for line in body.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.DOTALL))
    typed = [line.partition("  #")[0].strip() for line in [*lines, *inline]]
    starts = ("./run", "./test", "docker compose run --rm setup")
    return [line for line in typed if line.startswith(starts) and "…" not in line]


def check_cli(words: list[str]) -> None:
    """Fail unless these words are a command of ours with options that it has."""
    command: Any = typer.main.get_command(app)
    known = {option for parameter in command.params for option in parameter.opts}
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{command.name} has no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
        known |= {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= known | {"--help"}, f"unknown: {given - known}"


class TestLinks:
    @by_page
    def test_lead_somewhere(self, page: Path) -> None:
        for link in links(page):
            path, _, fragment = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            if fragment:
                assert fragment in anchors(target), link

    @pytest.mark.parametrize("folder", ["docs", "PRD"])
    def test_every_page_is_listed_in_its_index(self, folder: str) -> None:
        index = ROOT / folder / "README.md"
        listed = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
        indexes = {path for path in PAGES if path.name == "README.md"}
        assert {path for path in PAGES if path.is_relative_to(ROOT / folder)} - indexes <= listed


class TestCommands:
    @by_page
    def test_exist(self, page: Path) -> None:
        for line in commands(page):
            program, *words = shlex.split(line)
            if program == "./test":
                names = {row.name for row in (*tasks.SUITES, *tasks.CHECKS)} | {"lock", "--list"}
                assert not words or words[0] in names, line
            elif program == "docker":
                check_cli(words[4:])
            else:
                check_run(words)

    def test_the_readme_shows_the_two_that_matter(self) -> None:
        assert {"./run", "./test"} <= set(commands(ROOT / "README.md"))

    def test_the_first_request_is_the_same_everywhere(self) -> None:
        query = "model=llama-7b&region=ap-south-1&prompt=hello"
        first = (
            f'curl -X POST "http://localhost:8080/v1/chat/completions?{query}" \\\n'
            '  -H "Authorization: Bearer sk_dev_demo"'
        )
        assert first in (ROOT / "README.md").read_text()
        assert first in (ROOT / "PRD" / "requirements.md").read_text()


@cache
def run_help() -> str:
    """What `./run --help` prints."""
    done = subprocess.run([ROOT / "run", "--help"], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_run(words: list[str]) -> None:
    """Fail unless `./run WORDS` is something that it does, by its own help."""
    while words and words[0].startswith("--"):
        assert words[0] in run_help(), words[0]
        words = words[2:] if words[0] in ("--state", "--port") else words[1:]
    if not words:
        return
    assert re.search(rf"\b{re.escape(words[0])}\b", run_help()), words[0]
    if words[0] not in ("doctor", "temporal"):
        check_cli(words)
    if words[:3] == ["temporal", "workflow", "start"]:
        options = dict(zip(words[3::2], words[4::2], strict=True))
        known = WORKFLOW_INPUTS[options["--type"]]
        assert not isinstance(read_input(known.type, json.loads(options["--input"])), Refused)


class TestContents:
    @by_page
    def test_json_can_be_read(self, page: Path) -> None:
        for body in fences(page, "json"):
            json.loads(body)

    @by_page
    def test_python_can_be_read(self, page: Path) -> None:
        for body in fences(page, "python"):
            ast.parse(body)

    @by_page
    def test_names_no_path_of_one_machine_and_no_registry(self, page: Path) -> None:
        text = page.read_text()
        assert not re.search(r"/(?:root|home|tmp|work)/", text)
        assert not re.search(r"\bpypi\.org|pythonhosted|npmjs\.(?:org|com)|docker\.io|ghcr\.io|quay\.io", text)

    @by_page
    def test_names_only_settings_that_exist(self, page: Path) -> None:
        known = {f"CROSSLOGIC_{name.upper()}" for name in Settings.model_fields}
        # What an agent is started with is no setting of the control plane's.
        known |= {f"{config.PREFIX}{name}" for name in re.findall(r'"([A-Z_0-9]+)"', inspect.getsource(config.Config))}
        named = set(re.findall(r"\bCROSSLOGIC_[A-Z_]*[A-Z]\b", page.read_text()))
        assert named <= known

    @by_page
    def test_lines_of_prose_say_what_is_done_not_what_is_left(self, page: Path) -> None:
        assert not re.search(r"\b(?:TODO|FIXME|TBD|XXX)\b", prose(page))


class TestReference:
    def test_settings_are_current(self) -> None:
        assert PAGE.read_text() == settings_page(), "run ./test reference"

    def test_metrics_are_current(self) -> None:
        assert METRICS_PAGE.read_text() == metrics_page(), "run ./test reference"

    def test_node_states_are_the_code_s(self) -> None:
        text = (ROOT / "docs" / "reference" / "node-states.md").read_text()
        head, _, tail = text.partition("## Transitions")
        rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", tail, re.MULTILINE)
        assert set(rows) == {
            (state.value, event.value, following.value)
            for state, ways in TRANSITIONS.items()
            for event, following in ways.items()
        }
        states = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", head, re.MULTILINE))
        assert set(states) == {state.value for state in NodeState}
        assert {name for name, meaning in states.items() if meaning.startswith("final")} == {
            state.value for state in FINAL_STATES
        }

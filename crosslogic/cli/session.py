"""One invocation: which API it talks to, as whom, and how it shows what it gets.

Nothing heavy is imported here: a command must answer at once.
"""

from __future__ import annotations

import functools
import inspect
import json
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from crosslogic.dev.state import State
from crosslogic.domain.credentials import DEV_ADMIN_TOKEN

if TYPE_CHECKING:
    import httpx

# The longest that an operator should look at a command that does not answer. The API itself gives up earlier.
TIMEOUT_S = 30.0
PAGE_SIZE = 200

_STATE = "State directory of the embedded stack, which says where its API is."
_API = "The API's URL, instead of a state directory's."
_TOKEN = "The admin token."
_JSON = "Print JSON, for programs."

# Before the command: the environment counts here, so that it never outweighs an option that was written.
StateDefault = Annotated[Path | None, typer.Option("--state", help=_STATE, envvar="CROSSLOGIC_STATE_DIR")]
ApiDefault = Annotated[str | None, typer.Option("--api", help=_API, envvar="CROSSLOGIC_API_URL")]
TokenDefault = Annotated[str | None, typer.Option("--token", help=_TOKEN, envvar="CROSSLOGIC_ADMIN_TOKEN")]
# After it.
StateOption = Annotated[Path | None, typer.Option("--state", help=_STATE)]
ApiOption = Annotated[str | None, typer.Option("--api", help=_API)]
TokenOption = Annotated[str | None, typer.Option("--token", help=_TOKEN)]
JsonOption = Annotated[bool, typer.Option("--json", help=_JSON)]

_defaults: dict[str, Any] = {}


def connection_defaults(
    state: StateDefault = None, api: ApiDefault = None, token: TokenDefault = None, is_json: JsonOption = False
) -> None:
    """Administer CrossLogic Inference Cloud through its admin API."""
    _defaults.update(state=state, api=api, token=token, is_json=is_json)


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function whose first parameter is a Session, adding the options that every command has."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name)(_with_session(function))
        return function

    return register


def default(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register such a function as what a group does when no command of it is named."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        run = _with_session(function)

        @functools.wraps(function)
        def unless_named(context: typer.Context, **values: Any) -> None:
            if context.invoked_subcommand is None:
                run(**values)
            elif given := [name for name, value in values.items() if value]:
                option = given[0].removeprefix("is_").replace("_", "-")
                raise typer.BadParameter(f"write it after {context.invoked_subcommand}", param_hint=f"--{option}")

        own = inspect.signature(run).parameters.values()
        named = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        setattr(unless_named, "__signature__", inspect.Signature([named, *own]))  # noqa: B010
        app.callback(invoke_without_command=True)(unless_named)
        return function

    return register


def _with_session(function: Callable[..., None]) -> Callable[..., None]:
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    common = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for option, default, annotation in (
            ("state", None, StateOption),
            ("api", None, ApiOption),
            ("token", None, TokenOption),
            ("is_json", False, JsonOption),
        )
    ]

    @functools.wraps(function)
    def run(**values: Any) -> None:
        given = {option.name: values.pop(option.name) for option in common}
        if given["state"] is not None and given["api"] is None:
            _defaults["api"] = None  # What was said last and nearest counts.
        session = Session(**{option: value or _defaults.get(option) for option, value in given.items()})
        try:
            function(session, **values)
        except BrokenPipeError:  # The reader (head, less) has seen enough.
            sys.stderr.close()
            raise SystemExit(0) from None

    # Typer reads a command's options from its signature.
    setattr(run, "__signature__", inspect.Signature([*own, *common]))  # noqa: B010
    return run


def fail(message: str) -> NoReturn:
    """One line saying what is wrong and what to do next; exit code 1."""
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(1)


class Session:
    """The admin API as one command sees it. Errors end the process with one line."""

    def __init__(
        self,
        *,
        state: Path | None = None,
        api: str | None = None,
        token: str | None = None,
        is_json: bool | None = False,
    ) -> None:
        self._state = state
        self._api = api
        self._token = token
        self.is_json = bool(is_json)

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """GET below /admin. Query values of None are left out."""
        return self._request("GET", path, query=query)

    def send(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST, PUT or PATCH below /admin. Fields of None are sent as null."""
        return self._request(method, path, body=body)

    def get_all(self, path: str, most: int, **query: Any) -> list[dict[str, Any]]:
        """A whole list, page by page, up to `most`; on stderr, a word if there is more."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while len(found) < most:
            page = self.get(path, **query, after=after, limit=min(PAGE_SIZE, most - len(found)))
            found += page["data"]
            after = page["next_after"]
            if after is None:
                return found
        print(f"(the first {most}; more with --limit)", file=sys.stderr)
        return found

    def show_table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> None:
        """Rows as a table of these columns, or all of them as JSON."""
        if self.is_json:
            print(json.dumps(rows, indent=2))
        elif not rows:
            print(empty)
        else:
            lines = [[column.replace("_", " ") for column in columns]]
            lines += [[_cell(row[column]) for column in columns] for row in rows]
            widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
            for line in lines:
                print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    def show(self, item: Mapping[str, Any], *fields: str, note: str = "") -> None:
        """One item, a line for each of `fields` (all if none are named), or as JSON."""
        if self.is_json:
            print(json.dumps(item, indent=2))
            return
        shown = fields or tuple(item)
        width = max(len(field) for field in shown)
        for field in shown:
            print(f"{field.replace('_', ' ').ljust(width)}  {_cell(item[field])}")
        if note:
            print(note)

    def say(self, item: Mapping[str, Any], sentence: str) -> None:
        """What happened in one sentence, or the item as JSON."""
        print(json.dumps(item, indent=2) if self.is_json else sentence)

    def _request(
        self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        httpx = _import_httpx()
        url = self.url
        # A proxy of the environment is for the world outside, not for this machine.
        is_local = httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
        # Without TLS no authorities are needed, and loading them takes a while; this context trusts none.
        verify = url.startswith("https://") or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=not is_local, verify=verify) as client:
                answer = client.request(
                    method,
                    f"/admin{path}",
                    params={name: value for name, value in (query or {}).items() if value is not None},
                    json=body,
                    headers={"authorization": f"Bearer {self._token or DEV_ADMIN_TOKEN}"},
                )
        except httpx.TransportError as error:
            fail(
                f"the API at {url} does not answer ({type(error).__name__}). Start it with ./run, or say where it is "
                "with --state DIR or --api URL."
            )
        return _read(answer, url)

    @property
    def url(self) -> str:
        """The API's URL. Ends the process when it is not known."""
        if self._api:
            if not self._api.startswith(("http://", "https://")):
                fail(f"--api {self._api!r} is no URL. Write http://HOST:PORT or https://HOST.")
            return self._api.rstrip("/")
        state = State.at(self._state)
        url = state.read("endpoints.json").get("api")
        if not url:
            fail(
                f"there is no stack in {state.path} (no endpoints.json). Start one with ./run, or say where the API is "
                "with --state DIR or --api URL."
            )
        return str(url).rstrip("/")


def _import_httpx() -> Any:
    # httpx loads a command line of its own when it can, which takes longer than all the rest of a command.
    sys.modules.setdefault("httpx._main", cast(Any, None))
    import httpx

    return httpx


def _read(answer: httpx.Response, url: str) -> dict[str, Any]:
    try:
        body: Any = answer.json()
    except ValueError:
        body = None
    if answer.is_success and isinstance(body, dict):
        return cast(dict[str, Any], body)
    try:
        message = str(body["error"]["message"])
    except (TypeError, KeyError):
        fail(f"what answers at {url} is not our API (HTTP {answer.status_code}). Check --api.")
    if answer.status_code == 401:
        message += " Give it with --token."
    fail(message)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in cast(list[Any], value)) or "–"
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    # Instants to the second.
    if len(text) > 20 and text[4:5] == "-" and text[10:11] == "T" and text.endswith("Z"):
        return text[:19].replace("T", " ") + "Z"
    return text

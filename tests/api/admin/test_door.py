"""Who gets in, and what an error looks like from outside."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from pydantic import SecretStr

from crosslogic.settings import Settings
from tests.api.admin.server import TOKEN, serving


def error_of(answer: httpx.Response) -> dict[str, str | None]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    return body["error"]


def origin(client: httpx.Client) -> str:
    return str(client.base_url).removesuffix("/admin/")


class TestToken:
    @pytest.mark.parametrize(
        ("authorization", "status", "code"),
        [
            (None, 401, "missing_admin_token"),
            ("", 401, "missing_admin_token"),
            ("Bearer", 401, "missing_admin_token"),
            (f"Basic {TOKEN}", 401, "missing_admin_token"),
            (f"Bearer {TOKEN}x", 401, "wrong_admin_token"),
            (f"Bearer {TOKEN[:-1]}", 401, "wrong_admin_token"),
            ("Bearer adm_dev_demo", 401, "wrong_admin_token"),
            ("Bearer sk_dev_demo", 403, "not_an_admin_token"),
            ("Bearer ключ".encode(), 401, "wrong_admin_token"),
        ],
    )
    def test_without_the_right_one_nobody_gets_in(
        self, empty: httpx.Client, authorization: str | bytes | None, status: int, code: str
    ) -> None:
        headers = {} if authorization is None else {"authorization": authorization}
        answer = httpx.get(f"{empty.base_url}orgs", headers=headers, trust_env=False)  # pyright: ignore[reportArgumentType]
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
        assert TOKEN not in answer.text

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    def test_with_it_one_does(self, empty: httpx.Client, scheme: str) -> None:
        answer = empty.get("/orgs", headers={"authorization": f"{scheme} {TOKEN}"})
        assert answer.status_code == 200

    def test_every_route_stands_behind_the_door(self, empty: httpx.Client) -> None:
        """Whatever is sent: the token is looked at first."""
        url = origin(empty)
        document = httpx.get(f"{url}/openapi.json", trust_env=False).json()
        tried = 0
        for path, methods in document["paths"].items():
            assert path.startswith("/admin/")
            for method in methods:
                answer = httpx.request(method, url + path, content=b"{", trust_env=False)
                assert (answer.status_code, error_of(answer)["code"]) == (401, "missing_admin_token"), path
                tried += 1
        assert tried >= 30

    def test_every_route_is_documented(self, empty: httpx.Client) -> None:
        document = httpx.get(f"{origin(empty)}/openapi.json", trust_env=False).json()
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                assert operation.get("description"), (method, path)
                assert operation["security"] == [{"admin token": []}], (method, path)
                assert operation["tags"], (method, path)
                assert "422" not in operation["responses"], (method, path)
                assert "4XX" in operation["responses"], (method, path)
        for name, schema in document["components"]["schemas"].items():
            assert schema.get("description") or schema.get("enum"), name


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "param", "word"),
        [
            (b"{", None, "not valid JSON"),
            (b"[]", None, "body"),
            (b"", None, "body"),
            (b"{}", "name", "Field required"),
            (b'{"name": "Not Ok"}', "name", "pattern"),
            (b'{"name": "ok", "plan": "gold"}', "plan", "serverless"),
            (b'{"name": "ok", "paln": "serverless"}', "paln", "Extra inputs"),
            (b'{"name": "ok", "region_preferences": [7]}', "region_preferences.0", "string"),
            (b'{"name": "ok", "region_preferences": ["atlantis"]}', "region", "in-mumbai"),
            (b'{"name": "a\\u0000"}', "name", "pattern"),
        ],
    )
    def test_a_wrong_body_is_a_400_that_names_the_field(
        self, empty: httpx.Client, content: bytes, param: str | None, word: str
    ) -> None:
        answer = empty.post("/orgs", content=content, headers={"content-type": "application/json"})
        error = error_of(answer)
        assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert word in str(error["message"])

    def test_what_was_sent_is_not_repeated(self, empty: httpx.Client) -> None:
        answer = empty.post("/keys", json={"org": "demo", "environment": "dev", "role": "sk_dev_canary"})
        assert answer.status_code == 400
        assert "canary" not in answer.text

    @pytest.mark.parametrize(
        ("method", "path", "status", "kind"),
        [
            ("GET", "/nothing", 404, "not_found_error"),
            ("DELETE", "/orgs", 405, "invalid_request_error"),
            ("GET", "/orgs/nobody", 404, "not_found_error"),
            ("GET", "/orgs/org_7", 400, "invalid_request_error"),
            ("GET", "/orgs?limit=0", 400, "invalid_request_error"),
            ("GET", "/orgs?limit=201", 400, "invalid_request_error"),
            ("GET", "/orgs?after=key_01k5", 400, "invalid_request_error"),
            ("GET", "/keys/%00", 400, "invalid_request_error"),
            ("GET", "/orgs/%00", 404, "not_found_error"),
            ("GET", "/audit?subject=%00", 200, ""),
            ("GET", "/usage?org=%00", 404, "not_found_error"),
            ("GET", "/nodes?region=atlantis", 400, "invalid_request_error"),
            ("GET", "/nodes?model=gpt-17", 404, "not_found_error"),
        ],
    )
    def test_kinds(self, empty: httpx.Client, method: str, path: str, status: int, kind: str) -> None:
        answer = empty.request(method, path)
        assert answer.status_code == status, answer.text
        if kind:
            assert error_of(answer)["type"] == kind

    @pytest.mark.parametrize(
        ("path", "token", "expected"),
        [
            ("/orgs/nobody", TOKEN, openai.NotFoundError),
            ("/orgs/org_7", TOKEN, openai.BadRequestError),
            ("/orgs", "wrong", openai.AuthenticationError),
            ("/orgs", "sk_dev_demo", openai.PermissionDeniedError),
        ],
    )
    def test_the_official_sdk_knows_them(
        self, empty: httpx.Client, path: str, token: str, expected: type[openai.APIStatusError]
    ) -> None:
        with (
            openai.OpenAI(api_key=token, base_url=str(empty.base_url), max_retries=0) as client,
            pytest.raises(expected) as caught,
        ):
            client.get(path, cast_to=object)
        assert caught.value.message
        assert caught.value.code


class TestDatabaseAway:
    def test_is_a_503_with_retry_after_and_heals(self, settings: Settings) -> None:
        dsn = urlsplit(settings.database_url.get_secret_value())
        with Relay(("127.0.0.1", dsn.port or 5432)) as relay:
            through = dsn._replace(netloc=dsn.netloc.replace(f":{dsn.port}", f":{relay.port}")).geturl()
            with (
                serving(settings.model_copy(update={"database_url": SecretStr(through)})) as url,
                httpx.Client(base_url=url, trust_env=False) as client,
            ):
                client.headers["authorization"] = f"Bearer {TOKEN}"
                assert client.get("/admin/orgs").status_code == 200
                relay.is_open = False
                relay.cut()
                for _ in range(3):
                    answer = client.get("/admin/orgs")
                    assert answer.status_code == 503
                    assert int(answer.headers["retry-after"]) >= 1
                    assert (error_of(answer)["type"], error_of(answer)["code"]) == ("server_error", "database_away")
                relay.is_open = True
                assert client.get("/admin/orgs").status_code == 200


class Relay:
    """A way to a server that can be cut: connections through it end, and new ones end at once while it is not open."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.is_open = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        for held in self._sockets:
            with contextlib.suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if not self.is_open:
                    client.close()
                    continue
                server = socket.create_connection(self.target)
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

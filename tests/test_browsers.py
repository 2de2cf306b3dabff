"""Who may call from a browser: pages of this machine and apps, not pages from elsewhere; and under which names."""

import asyncio
from typing import Any

import pytest
from harness import Json, Server

import app

OURS = ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:80", "app://obsidian.md", "tauri://localhost"]
NOT_OURS = ["http://evil.example", "https://localhost.evil.example", "http://cafe.be", "null", "http://127.0.0.1.evil"]


@pytest.mark.parametrize("origin", OURS)
def test_a_page_of_this_machine_may_ask(server: Server, origin: str) -> None:
    """It is told so, and which headers it may read; a preflight allows what it asks for."""
    answer = server.client.get("/api/version", headers={"Origin": origin})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
    assert "X-Backend" in answer.headers["access-control-expose-headers"]
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    allowed = server.client.options("/v1/messages", headers=ask)
    assert (allowed.status_code, allowed.headers["access-control-allow-headers"]) == (204, "x-api-key")


@pytest.mark.parametrize("origin", NOT_OURS)
def test_a_page_from_elsewhere_may_not(server: Server, origin: str) -> None:
    """Neither a question nor a preflight."""
    for verb in ("GET", "OPTIONS", "POST"):
        assert server.client.request(verb, "/api/version", headers={"Origin": origin}).status_code == 403


def test_a_page_may_read_an_error_that_nobody_foresaw() -> None:
    """It is told so as with any other reply, and the error has an id."""
    sent: list[Any] = []

    async def broken(*_: Any) -> Any:
        raise RuntimeError("on purpose")

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Json = {"type": "http", "method": "GET", "path": "/x", "headers": [(b"origin", OURS[0].encode())]}
    asyncio.run(app.Outermost(app.BrowserGuard(broken))(scope, broken, send))
    headers = dict(sent[0]["headers"])
    assert (sent[0]["status"], headers[b"access-control-allow-origin"]) == (500, OURS[0].encode())
    assert headers[b"x-request-id"].decode() in sent[1]["body"].decode()


def test_our_own_page_may_ask(server: Server) -> None:
    """Whatever name the server is called by, when it may be called so."""
    host = {"Host": "box.local:8005", "Origin": "http://box.local:8005"}
    assert server.client.get("/api/version", headers=host).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "deadbeef.de", "abc.de:80", "localhost.evil.example", "127.0.0.1.x"])
def test_a_name_that_somebody_else_gives_this_machine_is_refused(server: Server, host: str) -> None:
    """A name server may point any name at a loopback address: pages under it would be of our origin."""
    answer = server.client.get("/api/version", headers={"Host": host, "Origin": f"http://{host}"})
    assert answer.status_code == 403
    assert server.client.get("/api/version", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8005", "box.local", "a.internal:1", "127.0.0.1", "[::1]:80"])
def test_names_and_addresses_of_this_machine(server: Server, host: str) -> None:
    """Its own names, those of its network, and addresses, which no name server gives."""
    assert server.client.get("/api/version", headers={"Host": host}).status_code == 200

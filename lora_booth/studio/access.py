"""Who may call the page: whoever has the token, and of Gradio's routes only those that the page uses.

Gradio itself guards some routes and leaves others open; mounted in an app, it takes any file of this machine for an upload, and
its file route fetches addresses. So one gate stands in front of everything, and refuses what it does not know.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

COOKIE = "lora_booth_studio"
MOST_BODY = 32 * 2**20  # bytes of a call; photos and adapters come through the upload route; chosen
API = "/gradio_api"
READ = re.compile(
    rf"/|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/(assets|static|svelte)/[^\0]*"
    rf"|{API}/(theme\.css|info/?|app_id/?|startup-events|queue/data|queue/status|upload_progress|heartbeat/\w+|file=(?!https?:)[^\0]+)",
    re.IGNORECASE,
)
WRITE = re.compile(rf"{API}/(queue/join|upload|cancel|reset|component_server)/?")
HEADERS = {
    # the page loads nothing from elsewhere and sends nothing there, whatever gets into it
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
PLEASE = "This studio is private. Open the address that `lora-booth studio` printed: it ends with the token."


class Gate:
    """An ASGI app before another. uploads: the folder that calls may name files in"""

    def __init__(self, app: Any, *, token: str, uploads: Path) -> None:
        self.app, self.token, self.uploads = app, token, uploads.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page uses no web sockets
            return
        given = parse_qs(scope["query_string"].decode("ascii", "replace")).get("token", [""])[0]
        if scope["path"] == "/" and self.fits(given):
            cookie = f"{self.cookie_name(scope)}={self.token}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000"
            await answer(send, 303, "", {"location": "./", "set-cookie": cookie})
            return
        if not self.fits(self.cookie_of(scope)):
            await answer(send, 401, PLEASE)
            return
        path, method = scope["path"], scope["method"]
        known = READ if method in ("GET", "HEAD") else WRITE if method == "POST" else None
        if known is None or not known.fullmatch(path):
            await answer(send, 404, "The studio has no such page.")
            return
        if method == "POST" and not path.startswith((f"{API}/upload", f"{API}/component_server")):
            body = await whole(receive)
            if body is None or not self.allowed(body):
                await answer(send, 403, "A call may name only files that were uploaded to the studio.")
                return
            receive = repeated(body, receive)
        await self.app(scope, receive, with_headers(send))

    def fits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    def cookie_name(self, scope: Scope) -> str:
        """Browsers send a cookie to every port of a host."""
        return f"{COOKIE}_{(scope.get('server') or ('', 0))[1]}"

    def cookie_of(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == b"cookie":
                try:
                    found = SimpleCookie(value.decode("latin-1")).get(self.cookie_name(scope))
                except CookieError:
                    continue
                if found is not None:
                    return found.value
        return ""

    def allowed(self, body: bytes) -> bool:
        """Whether every file that a call names is an upload: Gradio reads what stands under "path"."""
        try:
            paths = list(values_of(json.loads(body or b"null"), "path"))
            return all(path is None or self.uploads in Path(path).resolve().parents for path in paths)
        except (ValueError, TypeError, OSError, RecursionError):
            return False


def values_of(value: Any, key: str) -> Iterator[Any]:
    """What stands under a key at any depth."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from values_of(one, key)


async def whole(receive: Receive) -> bytes | None:
    """The body of a request; None if it is too long, or the client has gone."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > MOST_BODY:
            return None
        if not message.get("more_body"):
            return body


def repeated(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return again


def with_headers(send: Send) -> Send:
    async def more(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *ours]}
        await send(message)

    return more


async def answer(send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    given = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"} | HEADERS | (headers or {})
    lines = [(name.encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": text.encode()})

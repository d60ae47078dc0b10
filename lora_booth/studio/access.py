"""Who may call the page: whoever has the token, and of Gradio's routes only those that the page uses.

Gradio itself guards some routes and leaves others open; mounted in an app, it takes any file of this machine for an upload, and
its file route fetches addresses. So one gate stands in front of everything, and refuses what it does not know.
"""

from __future__ import annotations

import hmac
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

COOKIE = "lora_booth_studio"
YEAR = 365 * 24 * 3600  # seconds
API = "/gradio_api"
READ = re.compile(
    rf"/|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/(assets|static|svelte)/[^\0]*"
    rf"|{API}/(theme\.css|info/?|app_id/?|startup-events|queue/data|queue/status|upload_progress|heartbeat/\w+|file=(?!https?:)[^\0]+)",
    re.IGNORECASE,
)
WRITE = re.compile(rf"{API}/(queue/join|upload|cancel|reset|component_server)/?")
BINARY = (f"{API}/upload", f"{API}/component")  # files, and what is painted
# the page loads nothing from elsewhere and sends nothing there, whatever gets into it
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'; form-action 'self'"
HEADERS = {"referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
PLEASE = "This studio is private. Open the address that `lora-booth studio` printed: it ends with the token."


class Gate:
    """An ASGI app before another.

    uploads  the folder that calls may name files in
    frame    the site that shows the page in a frame, and where it is encrypted on its way; None: none may
    """

    def __init__(self, app: Any, *, token: str, uploads: Path, frame: str | None = None) -> None:
        self.app, self.token, self.uploads = app, token, uploads.resolve()
        ancestors, site = ("'none'", "Strict") if frame is None else (frame, "None; Secure; Partitioned")
        self.headers = HEADERS | {"content-security-policy": f"{POLICY}; frame-ancestors {ancestors}"}
        self.cookie = f"Max-Age={YEAR}; Path=/; HttpOnly; SameSite={site}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def protected(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page uses no web sockets
            return
        request = Request(scope, receive)
        # a page that was closed: during a call, or with its stream open, and then Gradio may forget the page twice
        with suppress(ClientDisconnect, *[KeyError] * scope["path"].endswith("/queue/data")):
            answer = self.refusal(request)
            if answer is None and request.method == "POST" and not scope["path"].startswith(BINARY):
                body = await request.body()
                receive = repeated(body, receive)
                if not self.allowed(body):
                    answer = PlainTextResponse("A call may name only files that were uploaded to the studio.", 403)
            await (answer or self.app)(scope, receive, protected)

    def refusal(self, request: Request) -> Response | None:
        """What to answer to a call that goes no further."""
        path, name = request.scope["path"], f"{COOKIE}_{request.url.port}"  # browsers send a cookie to every port of a host
        if path == "/" and self.fits(request.query_params.get("token", "")):
            return RedirectResponse("./", 303, {"set-cookie": f"{name}={self.token}; {self.cookie}"})
        if not self.fits(request.cookies.get(name, "")):
            return PlainTextResponse(PLEASE, 401)
        known = {"GET": READ, "HEAD": READ, "POST": WRITE}.get(request.method)
        return None if known and known.fullmatch(path) else PlainTextResponse("The studio has no such page.", 404)

    def fits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    def allowed(self, body: bytes) -> bool:
        """Whether every file that a call names is an upload: Gradio reads what stands under "path"."""
        paths: list[Any] = []
        try:
            json.loads(body or b"null", object_hook=lambda found: paths.append(found.get("path")))
            return all(path is None or self.uploads in Path(path).resolve().parents for path in paths)
        except (ValueError, TypeError, OSError, RecursionError):
            return False


def repeated(body: bytes, receive: Any) -> Any:
    """The body once more, then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again

"""Serving the page: a local server with the gate before it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
import webbrowser
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, SettingsError
from ..files import open_regular, write_file
from ..photos.opening import MAX_BYTES

TOKEN = ".token"
LOCAL = ("127.0.0.1", "localhost", "::1")
HUB = "https://huggingface.co"


def app_of(root: Path) -> tuple[Any, str]:
    """The page of a studio's folder as an ASGI app, and its token. Raises MissingExtraError."""
    if find_spec("gradio") is None:
        raise MissingExtraError("the studio", "studio")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the Hub's library is imported: nothing is fetched
    from .folder import UPLOADS, StudioFolder

    folder = StudioFolder(root)
    uploads = folder.root / UPLOADS
    if uploads.is_symlink():
        raise SettingsError(f"{uploads.name} in the studio's folder is a link; remove it")
    shutil.rmtree(uploads, ignore_errors=True)
    uploads.mkdir(mode=0o700, exist_ok=True)
    # before Gradio is imported: where it keeps files, and that nothing leaves the machine
    os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
    import gradio as gr
    from fastapi import FastAPI

    from .access import Gate
    from .page import CSS, page, theme

    blocks = page(folder)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="",
        allowed_paths=[str(folder.root)],
        blocked_paths=[str(folder.root / TOKEN)],
        show_error=False,
        max_file_size=MAX_BYTES,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=theme(),
        css=CSS,
    )
    blocks.has_launched = True  # else a mounted page takes any file of this machine for an upload
    token = token_of(folder.root / TOKEN)
    return Gate(app, token=token, uploads=uploads, frame=HUB if space() else None), token


def space() -> str:
    """OWNER/NAME of the Hugging Face Space that this machine is; empty elsewhere."""
    return os.environ.get("SPACE_ID", "")


def token_of(path: Path) -> str:
    """The same at every start, so that an open page goes on when its server comes back. Only its owner can read it."""
    try:
        with open_regular(path) as file:
            kept = file.read(200).decode("ascii")
        if len(kept) >= 32 and kept.isprintable() and not path.is_symlink():
            return kept
    except (OSError, ValueError):
        pass
    made = secrets.token_urlsafe(32)
    write_file(path, made.encode())
    path.chmod(0o600)
    return made


def serve(root: Path, *, host: str, port: int, browser: bool, say: Callable[[str], None]) -> None:
    """Until Ctrl-C. Trainings go on without it. Raises SettingsError if the port is taken."""
    app, token = app_of(root)
    place, origin = listening(host, port, say)
    address = f"{HUB}/spaces/{space()}?token={token}" if space() else f"{origin}/?token={token}"
    say(f"the studio of {root}: {address}")
    say("Ctrl-C ends it; a training goes on")
    if browser:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    run(app, place)


def listening(host: str, port: int, say: Callable[[str], None]) -> tuple[socket.socket, str]:
    """A socket, and its address. Raises SettingsError if the port is taken."""
    if host not in LOCAL and not space():
        say("note: other machines can reach it; whoever has the token can use it, and what is sent is not encrypted")
    try:
        place = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SettingsError(f"port {port} on {host} cannot be used ({error.strerror}); pass another as --port") from None
    return place, f"http://{f'[{host}]' if ':' in host else host}:{place.getsockname()[1]}"


def run(app: Any, place: socket.socket) -> None:
    """Until Ctrl-C."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, access_log=False)
    uvicorn.Server(config).run(sockets=[place])

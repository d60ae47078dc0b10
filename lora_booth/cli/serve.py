"""The command that serves pictures over HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..errors import MissingExtraError
from ..serve.limits import Limits
from .app import say
from .arguments import check_folder
from .options import Base, Loading, command

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


@command
def serve(
    *,
    adapters: Path,  # folder of adapters to serve, and for those that callers send, e.g. adapters, or the runs of train-many
    base: Base = "toybox",
    loading: Loading,
    limits: Limits,
    host: str = "127.0.0.1",  # address to listen on, e.g. 0.0.0.0 for other machines
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0: any that is free")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LORA_BOOTH_TOKEN", show_envvar=False, help="bearer token of callers [LORA_BOOTH_TOKEN, or one made]"
        ),
    ] = None,
) -> None:
    """Serve pictures of many adapters to many callers, over HTTP as OpenAI's clients speak it."""
    if any(find_spec(package) is None for package in PACKAGES):
        raise MissingExtraError("the server", "serve")
    from ..files import make_folder
    from ..serve.app import serve as serve_adapters

    check_folder(adapters, "--adapters")
    make_folder(adapters.absolute())
    serve_adapters(loading.base(base), adapters, token=token, limits=limits, host=host, port=port, say=say)

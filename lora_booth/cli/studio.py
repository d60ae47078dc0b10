"""The command that opens the studio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import say
from .options import command


@command
def studio(
    folder: Annotated[Path, typer.Argument(help="folder for photos, runs, adapters and pictures, e.g. studio")] = Path(
        "studio"
    ),
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of the page; 0: any that is free")] = 7860,
    host: str = "127.0.0.1",  # address to listen on, e.g. 0.0.0.0 to open the page on your phone
    browser: bool = True,  # open the page in the browser
) -> None:
    """Open the studio, a local page for everything: photos, training, pictures, adapters."""
    from ..studio.server import serve

    serve(folder, host=host, port=port, browser=browser, say=say)

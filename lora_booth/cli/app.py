"""What every command shares: the Typer app, warnings and errors as plain lines, exit codes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from ..base.library_logging import quiet_about_torchvision
from ..errors import CompositionWarning, LeftOutWarning, LoraBoothError, OtherBaseWarning, in_command, shown

app = typer.Typer(
    help="DreamBooth with LoRA: teach Stable Diffusion one subject from a few photos.",
    rich_markup_mode=None,  # plain text: the brackets in a help line are its defaults, not markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def say(text: str) -> None:
    print(text, flush=True)


OUR_WARNINGS = (CompositionWarning, LeftOutWarning, OtherBaseWarning)
INTERRUPTED = 130  # the shell's exit code for it


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point. Exits with 0, 1 (a token that cannot be used), 2 (a user's mistake) or 130 (interrupted)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    quiet_about_torchvision()
    outside = in_command.set(True)
    try:
        with plain_warnings():
            code = app(args=words or ["--help"], prog_name="lora-booth", standalone_mode=False)
    except LoraBoothError as error:
        fail(str(error))
    except OSError as error:  # a file that cannot be written, a full disk
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # what every usage error has, both typer's and click's
            raise
        command = next((word for word in words if word in commands()), "")
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        fail(f"{message}; see: lora-booth {command} --help".replace("  ", " "))
    finally:
        in_command.reset(outside)
    if code == INTERRUPTED:
        print("interrupted; a training continues when you run the same command again", file=sys.stderr)
    sys.exit(code or 0)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show this library's warnings as one plain line each, and others as usual."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, OUR_WARNINGS):
            print(f"note: {shown(message)}", file=sys.stderr, flush=True)
        else:
            usual(message, category, *place, **more)

    with warnings.catch_warnings():
        usual = warnings.showwarning
        for category in OUR_WARNINGS:
            warnings.simplefilter("default", category)
        warnings.showwarning = show
        yield


def commands() -> list[str]:
    return [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def fail(message: str) -> NoReturn:
    """Print the message in one line, whatever it holds, and exit."""
    print(f"error: {shown(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)

"""What every command shares: the Typer app, warnings and errors as plain lines, exit codes."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from ..base.library_logging import quiet_about_torchvision
from ..errors import CompositionWarning, LeftOutWarning, LoraBoothError, OtherBaseWarning, in_command, shown

app = typer.Typer(
    help="DreamBooth with LoRA: teach Stable Diffusion one subject from a few photos.",
    rich_markup_mode=None,  # plain text: the brackets in a help line are its defaults, not markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(asked: bool) -> None:
    if asked:
        say(f"lora-booth {__version__}")
        raise typer.Exit


Version = typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=show_version)


@app.callback()
def root(version: Annotated[bool, Version] = False) -> None: ...


def say(text: object) -> None:
    print(text, flush=True)


def say_json(facts: dict[str, Any]) -> None:
    say(json.dumps(facts, indent=2))


def note(text: str) -> None:
    """Progress, which is no result."""
    print(text, file=sys.stderr, flush=True)


OUR_WARNINGS = (CompositionWarning, LeftOutWarning, OtherBaseWarning)
INTERRUPTED = 130  # the shell's exit code for it


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point. Exits with 0, 1 (a token that cannot be used), 2 (a user's mistake) or 130 (interrupted)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a legacy code page lacks most characters
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
        fail(usage(error, words))
    finally:
        in_command.reset(outside)
    if code == INTERRUPTED:
        training = words[:1] in (["train"], ["train-many"])
        note("interrupted; run the same command again to continue" if training else "interrupted")
    sys.exit(code or 0)


@contextmanager
def interruptible() -> Iterator[None]:
    """A training that has said what its interrupt means ends the program without another line."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            sys.exit(INTERRUPTED)
        raise


PARSER = re.compile(r"Value error, |Input |, unable to parse string as an? \w+")  # typer's parser speaks to programmers


def usage(error: Any, words: Sequence[str]) -> str:
    """What is wrong with the words of a command, and where its options are listed."""
    message = PARSER.sub("", error.format_message()).strip()
    if getattr(error, "possibilities", None):  # of an unknown option, the nearest first
        message = f"{error.message}. Did you mean {error.possibilities[0]}?"
    elif (parameter := getattr(error, "param", None)) is not None:
        parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
        given = next((value for word, value in zip(parts, parts[1:], strict=False) if word in parameter.opts), None)
        if given is not None and repr(given) not in message:
            message = message.replace("Invalid value for", f"Invalid value {given!r} for")
    return f"{message.rstrip('.')}{'' if message.endswith('?') else '.'} See: {error.ctx.command_path} --help"


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


def fail(message: str) -> NoReturn:
    """Print the message in one line, whatever it holds, and exit."""
    print(f"error: {shown(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)

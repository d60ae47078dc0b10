"""Write docs/cli.md from the command line itself: `python docs/make_cli.py`. A test says when it was forgotten."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from lora_booth.cli.app import app

TARGET = Path(__file__).parent / "cli.md"
HEAD = """# The command line

<!-- made by docs/make_cli.py from lora_booth/cli/; edit that and run the script again -->

Exit codes: 0 done; 1 a token that cannot be used (`lora-booth token --check`); 2 a mistake, told in one line on stderr;
130 interrupted. `lora-booth COMMAND --help` says the same as this page.
"""
TYPES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def page() -> str:
    parts = [HEAD]
    for command in app.registered_commands:
        assert command.callback is not None
        parts.append(section(command.name or command.callback.__name__, command.callback))
    return "\n".join(parts)


def section(name: str, callback: Callable[..., Any]) -> str:
    hints = typing.get_type_hints(callback, include_extras=True)
    usage, arguments, options = [f"lora-booth {name}"], [], []
    for parameter in inspect.signature(callback).parameters.values():
        if hints[parameter.name] is typer.Context:
            continue
        kind, info = described(hints[parameter.name])
        text = (info.help or "").replace("|", "\\|") if info is not None else ""
        required = parameter.default is inspect.Parameter.empty
        if type(info).__name__ == "ArgumentInfo":
            many = typing.get_origin(kind) is list
            usage.append(parameter.name.upper() + ("..." if many else ""))
            arguments.append(f"| `{parameter.name.upper()}` | {text} | |")
            continue
        option = "--" + parameter.name.replace("_", "-")
        if typing.get_origin(kind) is list:
            [kind] = typing.get_args(kind)
        if kind is bool:
            shown = f"`{option}` / `--no-{option[2:]}`"
        else:
            value = "\\|".join(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else TYPES[kind]
            shown = f"`{option} {value}`"
        if required:
            usage.append(f"{option} {TYPES[kind]}")
        options.append(f"| {shown} | {text} | {'required' if required else default(parameter.default)} |")
    usage.append("[OPTIONS]" if len(options) > sum(" --" in word or word.startswith("--") for word in usage) else "")
    table = "\n".join(["| | meaning | default |", "| --- | --- | --- |", *arguments, *options])
    return f"## {name}\n\n{inspect.getdoc(callback)}\n\n```text\n{' '.join(usage).strip()}\n```\n\n{table}\n"


def described(hint: Any) -> tuple[Any, Any]:
    """The plain type of a parameter (of `X | None`: X), and typer's facts about it (None: nothing was written)."""
    info = hint.__metadata__[0] if hasattr(hint, "__metadata__") else None
    kind = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
    return kind, info


def default(value: object) -> str:
    if value is None:
        return ""  # the help says in brackets what it is then
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value.as_posix() if isinstance(value, Path) else value}`"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")

"""Write docs/reference.md from the docstrings: `python docs/make_reference.py`. A test says when it was forgotten."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import Any

import lora_booth

TARGET = Path(__file__).parent / "reference.md"
HEAD = """# Python

<!-- made by docs/make_reference.py from the docstrings; edit those and run the script again -->

`import lora_booth as lb` costs next to nothing: each name is imported when it is first used. What can go wrong on the user's
side is a `LoraBoothError` whose message says cause, value and remedy.
"""
GROUPS = {
    "Photos and subjects": ("Subject", "Photo", "make_masks", "check_token", "propose_tokens"),
    "Bases": ("BaseModel",),
    "Training": ("train", "train_many", "training_steps", "prepare", "Step", "LoraSpec", "TrainingConfig"),
    "Adapter files": ("Adapter", "Card", "LoraFactors", "merge", "resize", "difference", "bake", "extract", "attached"),
    "Pictures": ("Composition", "Weight", "Region", "preview", "Picture", "Recipe", "Serving", "Request"),
    "Prompts, grids, galleries": (
        "PROMPT_SETS",
        "fill_prompts",
        "read_prompts",
        "grid",
        "grid_steps",
        "before_after",
        "Grid",
        "Gallery",
    ),
    "Reports and scores": ("evaluate", "write_report"),
    "Errors": ("LoraBoothError",),
}
OTHERS = "More"


def page() -> str:
    named = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in lora_booth.__all__ if name not in named and not name.startswith("__"))
    parts = [HEAD]
    for title, names in {**GROUPS, OTHERS: rest}.items():
        if names:
            parts += [f"## {title}\n", *map(section, names)]
    return "\n".join(parts)


def section(name: str) -> str:
    thing = getattr(lora_booth, name)
    if inspect.isclass(thing):
        return f"### {name}\n\n{of_class(name, thing)}"
    if callable(thing):
        return f"### {name}\n\n{block(signature(thing, name))}\n{told(thing)}"
    values = ", ".join(map(repr, thing))
    return f"### {name}\n\n{block(f'{name}: {type(thing).__name__} of {values}')}"


def of_class(name: str, thing: type) -> str:
    # with what a dataclass inherits from another
    classes = [one for one in reversed(thing.__mro__) if one is thing or dataclasses.is_dataclass(one)]
    fields, parts = [field for one in classes for field in fields_of(one)], []
    if fields:
        parts.append(block(f"{name}(\n" + "\n".join(fields) + "\n)"))
    elif "__init__" in vars(thing):
        parts.append(block(signature(vars(thing)["__init__"], name, drop=True)))
    parts.append(told(thing))
    for method, raw in {name: raw for one in reversed(classes) for name, raw in vars(one).items()}.items():
        function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        if method.startswith("_"):
            continue
        if isinstance(function, property) and function.fget is not None and function.__doc__:
            parts.append(block(f"{name.lower()}.{method}") + "\n" + told(function))
        elif inspect.isfunction(function) and function.__doc__:
            owner = name if isinstance(raw, classmethod | staticmethod) else name.lower()
            parts.append(
                block(signature(function, f"{owner}.{method}", drop=not isinstance(raw, staticmethod))) + "\n" + told(function)
            )
    return "\n".join(parts)


def fields_of(thing: type) -> list[str]:
    """The lines of its source that declare fields."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(node, ast.ClassDef)
    lines = textwrap.dedent(inspect.getsource(thing)).splitlines()
    return [
        "\n".join(lines[item.lineno - 1 : item.end_lineno])
        for item in node.body
        if isinstance(item, ast.AnnAssign) and not ast.unparse(item.target).startswith("_")
    ]


def signature(function: Any, name: str, *, drop: bool = False) -> str:
    """As it stands in the source, defaults too, without `self` or `cls`; one parameter a line if it is long."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    assert isinstance(node, ast.FunctionDef)
    given, made = node.args, "" if node.returns is None else ast.unparse(node.returns)
    first = len(given.args) - len(given.defaults)
    plain = [(one, given.defaults[i - first] if i >= first else None) for i, one in enumerate(given.args)][drop:]
    parts = [parameter(one, default) for one, default in plain]
    if given.vararg is not None:
        parts.append("*" + parameter(given.vararg, None))
    elif given.kwonlyargs:
        parts.append("*")
    parts += [parameter(one, default) for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        parts.append("**" + parameter(given.kwarg, None))
    end = ")" if made in ("", "None") else f") -> {made}"
    line = f"{name}({', '.join(parts)}{end}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + end


def parameter(one: ast.arg, default: ast.expr | None) -> str:
    kind = "" if one.annotation is None else f": {ast.unparse(one.annotation)}"
    value = "" if default is None else f" = {ast.unparse(default)}"
    return (one.arg + kind + value).replace("'", '"')


def told(thing: Any) -> str:
    """The first paragraph as prose; the rest as it stands, since its columns are made by hand."""
    first, _, rest = (inspect.getdoc(thing) or "").partition("\n\n")
    prose = " ".join(first.split()).replace("<", "&lt;")
    if "\n" in first and any("  " in line.strip() for line in first.splitlines()):
        prose, rest = first.splitlines()[0], "\n".join(first.splitlines()[1:]) + ("\n\n" + rest if rest else "")
    return prose + "\n" + (f"\n{block(rest.rstrip())}" if rest.strip() else "")


def block(text: str) -> str:
    return f"```text\n{text}\n```\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")

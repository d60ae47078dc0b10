"""Lists of prompts: files, placeholders, and the DreamBooth paper's 25 prompts for each kind of subject."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..adapters.adapter import Adapter
from ..config import typed
from ..errors import SettingsError, shown
from ..subject.wording import article

# The prompts of the DreamBooth paper's evaluation (arXiv 2208.12242, supplementary material), as in the file
# dataset/prompts_and_classes.txt of github.com/google/dreambooth: what follows or changes "a {token} {class_noun}".
PAPER: dict[str, list[str]] = json.loads((files(__package__) / "paper_prompts.json").read_text(encoding="utf-8"))
PROMPT_SETS = {  # 25 each
    kind: (
        *(f"a {{token}} {{class_noun}} {context}" for context in (*PAPER["shared"], *PAPER[kind])),
        *(f"a {word} {{token}} {{class_noun}}" for word in PAPER["properties"]),
    )
    for kind in ("object", "live")
}

PLACEHOLDERS = ("token", "class_noun", "a", "context")
PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")  # other braces mean something to other tools, and stay
MAX_BYTES, MAX_PROMPTS, MAX_LENGTH = 2**20, 1_000, 2_000  # of a file of prompts; characters of a prompt; chosen


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line, without empty lines and lines that begin with #.

    Raises SettingsError for a file that cannot be read, is not UTF-8, or has too many or too long lines.
    """
    path = Path(typed("path", path, Path))
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{shown(path)}: {error.strerror}; pass a text file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{shown(path)}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LENGTH or not line.replace("\t", " ").isprintable():
            raise SettingsError(
                f"{shown(path)}:{number}: '{shown(line[:40])}' has more than {MAX_LENGTH} characters, or control characters"
            )
    prompts = [" ".join(line.split()) for line in lines if line and not line.startswith("#")]
    if not 1 <= len(prompts) <= MAX_PROMPTS or len(content) > MAX_BYTES:
        raise SettingsError(f"{shown(path)}: {len(prompts)} prompts; allowed: 1 to {MAX_PROMPTS}, one a line")
    return prompts


def fill_prompts(
    prompts: Sequence[str], *, token: str | None = None, class_noun: str | None = None, contexts: Sequence[str] = ()
) -> list[str]:
    """Each prompt with its placeholders filled: "a {token} {class_noun} {context}" -> a prompt for each context.

    {token}, {class_noun}  the subject's;  {a}  "a" or "an", by the class noun's sound;  {context}  each in turn
    Raises SettingsError for a placeholder that is unknown or has no value.
    """
    prompts, contexts = typed("prompts", prompts, tuple[str, ...]), typed("contexts", contexts, tuple[str, ...])
    token, class_noun = typed("token", token, str | None), typed("class_noun", class_noun, str | None)
    noun = class_noun or ""
    words = {"token": token, "class_noun": class_noun, "a": article(noun) if noun else None}
    filled: dict[str, None] = {}  # each once
    for prompt in prompts:
        names = {match[1] for match in PLACEHOLDER.finditer(prompt)}
        for name in sorted(names):
            if name not in PLACEHOLDERS:
                allowed = ", ".join(f"{{{word}}}" for word in PLACEHOLDERS)
                raise SettingsError(f"prompt {shown(prompt)!r}: {{{name}}} is unknown; allowed: {allowed}")
            if name != "context" and words[name] is None:
                raise SettingsError(f"prompt {shown(prompt)!r}: no adapter's card has {{{name}}}; write the word itself")
        if "context" in names and not contexts:
            raise SettingsError(f"prompt {shown(prompt)!r}: no contexts for {{context}}; pass some, e.g. 'in the snow'")
        for context in contexts if "context" in names else ("",):
            given = words | {"context": context}
            filled[PLACEHOLDER.sub(lambda match, given=given: str(given[match[1]]), prompt)] = None  # type: ignore[misc]
    return list(filled)


def prompts_for(adapters: Sequence[Adapter], prompts: Sequence[str], *, contexts: Sequence[str] = ()) -> list[str]:
    """`fill_prompts` with the token and class noun of the first adapter whose card has a token."""
    card = next((adapter.card for adapter in adapters if adapter.card.token), None)
    token, noun = (card.token, card.class_noun) if card is not None else (None, None)
    return fill_prompts(prompts, token=token, class_noun=noun, contexts=contexts)

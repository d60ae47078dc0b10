"""README.md of a shared adapter: front matter for the Hub, and how to use the file.

The card may come from an untrusted file. Its text appears only in the front matter, as scalars that huggingface_hub
quotes, in Python's string literals, and in Markdown code, where nothing is a link or a tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..base.families import FAMILIES, is_hub_id
from ..errors import one_line
from .contents import AdapterContents, Card, Consent, Layout, file_stem, ways

# the Hub's identifiers (huggingface.co/docs/hub/repositories-licenses); it lists every other licence as "other"
HUB_LICENSES = frozenset(
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause "
    "bsd-3-clause-clear bsl-1.0 cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 "
    "cc0-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl "
    "lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl ncsa odbl odc-by openrail openrail++ osl-3.0 pddl unlicense wtfpl zlib".split()
)
FAMILY_TAGS = {  # the Hub's tags for the family
    "sd1": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sd2": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sdxl": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
}
STATEMENTS: dict[Consent, str] = {
    "not stated": "The maker has not stated whom or what it shows, nor that anyone agreed.",
    "self": "The maker states that it shows the maker.",
    "consenting person": "The maker states that it shows a person who agreed to it.",
    "object": "The maker states that it shows an object, an animal or a place, and no person.",
    "own art": "The maker states that it was trained on the maker's own art.",
    "licensed art": "The maker states that it was trained on art that is licensed for it.",
}
PICTURE = "pictures/{:02d}.png"  # where the page's first, second, ... picture is


def model_card(adapter: AdapterContents, file: str, layout: Layout, pictures: Sequence[Any], source: str) -> str:
    """The page.

    file      name of the adapter's file
    pictures  of `Composition.generate`
    source    what a reader gives to diffusers' load_lora_weights: a Hub id, or "." for the folder itself
    """
    card = adapter.card
    base = code(card.base_model) if card.base_model else "a base that it does not name"
    family = f" ({FAMILIES[card.family].label})" if card.family in FAMILIES else ""
    trigger = f" Its words in a prompt: {code(card.words)}." if card.words else ""
    parts = [
        front_matter(adapter, pictures),
        f"# {code(adapter.name)}",
        "<Gallery />" if pictures else "",
        f"A LoRA adapter for {base}{family}, in a folder written by lora_booth {__version__}.{trigger}",
        fenced(card.description, "text") if card.description else "",
        sample_pictures(pictures) if pictures else "",
        usage(adapter, file, layout, source),
        facts(adapter),
        licence(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- untrusted text made harmless --------------------------------------------------------------------------------------


def fence(text: str, least: int) -> str:
    """More backticks than occur in a row anywhere in `text`."""
    longest = max(len(run) for run in "".join(c if c == "`" else " " for c in text).split(" "))
    return "`" * max(least, longest + 1)


def code(text: str) -> str:
    """A code span, which shows its text literally."""
    text = one_line(text) or "?"
    ticks = fence(text, 1)
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(text: str, language: str) -> str:
    lines = [line for line in map(one_line, text.splitlines()) if line] if language == "text" else [text.strip("\n")]
    ticks = fence("\n".join(lines), 3)
    return "\n".join([ticks + language, *lines, ticks])


# --- the parts of the page -----------------------------------------------------------------------------------------


def front_matter(adapter: AdapterContents, pictures: Sequence[Any]) -> str:
    from huggingface_hub import ModelCardData

    card = adapter.card
    data: dict[str, Any] = {}
    if is_hub_id(card.base_model):  # the Hub refuses the name of a base that it does not have
        data |= {"base_model": card.base_model, "base_model_relation": "adapter"}
    if card.prompt:
        data["instance_prompt"] = one_line(card.prompt)
    if card.license:
        known = card.license.strip().lower()
        name = "-".join(filter(None, (file_stem(part) for part in known.split())))[:60]
        data |= {"license": known} if known in HUB_LICENSES else {"license": "other", "license_name": name}
    if pictures:
        data["widget"] = [
            {"text": one_line(picture.prompt), "output": {"url": PICTURE.format(number)}}
            for number, picture in enumerate(pictures, 1)
        ]
    tags = ["text-to-image", "diffusers", "lora", "dreambooth", "template:sd-lora", *FAMILY_TAGS.get(card.family or "", ())]
    page = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=[*tags, "lora_booth"], **data)
    return f"---\n{page.to_yaml()}\n---"


def sample_pictures(pictures: Sequence[Any]) -> str:
    lines = []
    for number, picture in enumerate(pictures, 1):
        parts = [f"![picture {number}]({PICTURE.format(number)})", code(picture.prompt), f"seed {picture.seed}"]
        parts += [f"without {code(picture.negative_prompt)}"] if picture.negative_prompt else []
        parts += [f"{picture.steps} steps, guidance {picture.guidance:g}"] if picture.steps else []
        parts += [", ".join(f"{code(name)} at {weight:g}" for name, weight in picture.adapters)] if picture.adapters else []
        lines.append("- " + ", ".join(parts))
    return "\n".join(["## Pictures", "", *lines])


def usage(adapter: AdapterContents, file: str, layout: Layout, source: str) -> str:
    (_, _, script), *others = ways(adapter, file, source)
    parts = ["## Use", "In diffusers:", fenced(script, "python")]
    if layout == "kohya":
        parts += [f"In {program}: {sentence.replace(file, code(file), 1)} {code(text)}." for program, sentence, text in others]
    else:
        stem = file.removesuffix(".safetensors")
        parts.append(
            "This file has PEFT's names. For ComfyUI and A1111 rewrite it: "
            f"`lora-booth convert {file} {stem}_kohya.safetensors --layout kohya`."
        )
    return "\n\n".join(parts)


def facts(adapter: AdapterContents) -> str:
    card = adapter.card
    ranks = sorted({f.rank for f in adapter.modules.values()})
    known = {
        "base": code(card.base_model) if card.base_model else None,
        "family": FAMILIES[card.family].label if card.family in FAMILIES else None,
        "prediction type": code(card.prediction_type) if card.prediction_type else None,
        "resolution": f"{card.resolution} pixels" if card.resolution else None,
        "photos": card.photos,
        "steps": card.steps,
        "rank": f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ranks[0],
        "alpha": None if card.alpha is None else f"{card.alpha:g}",
        "layers": len(adapter.modules),
        "author": code(card.author) if card.author else None,
        "date": code(card.date) if card.date else None,
    }
    lines = [f"- {name}: {value}" for name, value in known.items() if value is not None]
    return "\n".join(["## Facts", "", *lines])


def licence(card: Card) -> str:
    stated = f"Licence: {code(card.license)}." if card.license else "No licence is stated; ask the maker before you pass it on."
    lines = [
        f"{stated} The licence of the base, with its restrictions of use, holds for the adapter as well.",
        f"{STATEMENTS[card.consent]} This is a declaration, not a proof.",
        "Do not make pictures that deceive about a person or that the person shown has not agreed to. Say that "
        "pictures are made by a model; those above carry IPTC's mark for it (`trainedAlgorithmicMedia`).",
    ]
    return "\n".join(["## Licence, consent and use", "", *(f"- {line}" for line in lines)])

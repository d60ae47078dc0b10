"""The card in a file's header: our own entry, and those that other programs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from ..base.families import FAMILIES, Family
from ..errors import SettingsError, one_line
from .contents import AdapterContents, Card, Layout, LoraFactors, file_stem, one_rank
from .layouts import component_of, fits

CARD_KEY = "lora_booth.card"
THUMBNAIL_KEY = "modelspec.thumbnail"  # a data URL
PEFT_KEY = "lora_adapter_metadata"  # never in a kohya file: diffusers raises ValueError there
SGM_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
FIELD_LENGTH = 500  # characters; longer text in a file is cut; chosen
MAX_NUMBER = 1e9  # a larger one is ignored; chosen
MAX_WEIGHT = 10.0  # a larger suggestion in a file is ignored, since it applies where the user gives no weight


def metadata_of(adapter: AdapterContents, layout: Layout, alpha: float, data_sha256: str) -> dict[str, str]:
    """Every header entry except those that need the finished file. No date: equal adapters give equal bytes."""
    card = adapter.card
    rank = one_rank(adapter.modules)
    trigger = card.words or None
    entries: dict[str, Any] = {
        "format": "pt",
        CARD_KEY: json.dumps(asdict(card), sort_keys=True, ensure_ascii=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": adapter.name,
        "modelspec.hash_sha256": f"0x{data_sha256}",
        "modelspec.description": card.description or summary(card),
        "modelspec.author": card.author,
        "modelspec.date": card.date,
        "modelspec.license": card.license,
        "modelspec.tags": card.tags or card.class_noun,
        THUMBNAIL_KEY: adapter.thumbnail,
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": f"{card.prompt}; weight {card.weight:g}" if card.prompt else None,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank or "Dynamic",
        "ss_network_alpha": "Dynamic" if rank is None else f"{alpha:g}",
        "ss_network_args": "{}",
        "ss_output_name": file_stem(adapter.name),  # A1111 writes it into prompts, as <lora:name:1>
        "ss_sd_model_name": card.base_model,
        "ss_resolution": None if card.resolution is None else f"({card.resolution}, {card.resolution})",
        "ss_num_train_images": card.photos,
        "ss_steps": card.steps,
        # A1111 and others offer these words for the prompt; only the trigger, never captions or folders
        "ss_tag_frequency": None if trigger is None else json.dumps({trigger: {trigger: card.photos or 1}}),
        "sshs_model_hash": data_sha256,
    }
    if card.family is not None:
        family = FAMILIES[card.family]
        entries |= {
            **base_entries(family, card.prediction_type or "epsilon", card.resolution),
            "modelspec.implementation": SGM_IMPLEMENTATION if layout == "kohya" and family.kohya_sgm else "diffusers",
            "ss_base_model_version": family.ss_base_model_version,
            "ss_v2": family.ss_v2,
        }
    # half a character, e.g. from a file name that is not UTF-8, would make the header unreadable for the safetensors library
    return {key: str(value).encode("utf-8", "replace").decode() for key, value in entries.items() if value is not None}


def base_entries(family: Family, prediction: str, resolution: int | None = None) -> dict[str, str]:
    """ModelSpec's entries on the base of a model or an adapter."""
    size = resolution or family.resolution[prediction]
    return {
        "modelspec.architecture": family.modelspec[prediction],
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
    }


def summary(card: Card) -> str:
    """Say what the adapter is in one or two sentences."""
    family = FAMILIES[card.family].label if card.family in FAMILIES else "Stable Diffusion"
    photos = f", trained on {card.photos} photo{'' if card.photos == 1 else 's'}" if card.photos else ""
    stated = "" if card.consent == Card.consent else f" The maker states of what it shows: {card.consent}."
    return f"A LoRA{f' of {card.words}' if card.words else ''} for {family}{photos}.{stated}"


def card_from(metadata: Mapping[str, str], modules: Mapping[str, LoraFactors], *, sgm: bool, stem: str) -> Card:
    """Our own card if the file has one, else what kohya's and ModelSpec's entries and the modules say.

    What is malformed in it is ignored: good tensors are not refused because of their card.
    sgm: some keys are named as only SDXL's are. stem: the title of an untitled file.
    """
    own = _own_facts(metadata)
    facts = own or _facts_of_others(metadata)
    card: Any = Card()
    for name, value in (("family", family_of(modules, metadata, sgm=sgm)), *facts.items()):
        with suppress(SettingsError):
            card = replace(card, **{name: one_line(value, FIELD_LENGTH) if isinstance(value, str) else value})
    if not card.title and not (own and card.token):
        card = replace(card, title=stem)
    return replace(card, weight=1.0) if abs(card.weight) > MAX_WEIGHT else card


def _own_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        values: Any = json.loads(metadata.get(CARD_KEY, ""))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict) or "family" not in values:
        return {}
    return {name: value for name, value in values.items() if name in Card.__dataclass_fields__ and value is not None}


def _facts_of_others(metadata: Mapping[str, str]) -> dict[str, Any]:
    def text(*keys: str) -> str | None:
        return next((metadata[key] for key in keys if metadata.get(key, "None") not in ("", "None")), None)

    prediction = text("modelspec.prediction_type") or ("v" if metadata.get("ss_v_parameterization") == "True" else None)
    size = (text("modelspec.resolution", "ss_resolution") or "").strip("()").replace("x", ",").split(",")[0]
    return {
        "prediction_type": "v_prediction" if prediction == "v" else prediction,
        "base_model": text("ss_sd_model_name"),
        "base_hash": text("ss_new_sd_model_hash", "ss_sd_model_hash"),
        "resolution": _number(size),
        "token": text("modelspec.trigger_phrase"),
        "rank": _number(text("ss_network_dim")),
        "alpha": _number(text("ss_network_alpha")),
        "steps": _number(text("ss_steps", "ss_max_train_steps")),
        "photos": _number(text("ss_num_train_images")),
        "title": text("modelspec.title", "ss_output_name"),
        "license": text("modelspec.license"),
    }


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < MAX_NUMBER else None


# --- the family ----------------------------------------------------------------------------------------------------


def family_of(modules: Mapping[str, LoraFactors], metadata: Mapping[str, str], *, sgm: bool) -> str | None:
    """What the modules prove, also those of a few blocks, else what the metadata say; None: more than one is possible."""
    widths = {f.down.shape[1] for name, f in modules.items() if name.endswith((".attn2.to_k", ".attn2.to_v"))}
    sizes = {name: (f.up.shape[0], f.down.shape[1]) for name, f in modules.items()}
    fitting = [name for name, family in FAMILIES.items() if all(fits(family, module, *size) for module, size in sizes.items())]
    proven = fitting or [name for name, family in FAMILIES.items() if widths == {family.text_width}]
    if len(proven) == 1:
        return proven[0]
    possible = proven or list(FAMILIES)
    if (stated := _stated_family(metadata)) in possible:
        return stated
    if "sdxl" in possible and (sgm or any(component_of(name) == "text_encoder_2" for name in modules)):
        return "sdxl"
    convolutions = any(f.down.ndim == 4 for name, f in modules.items() if name.endswith((".proj_in", ".proj_out")))
    return "sd1" if "sd1" in possible and convolutions else None


def _stated_family(metadata: Mapping[str, str]) -> str | None:
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    if version.startswith("sdxl") or architecture.startswith("stable-diffusion-xl"):
        return "sdxl"
    if version.startswith("sd_v2") or architecture.startswith("stable-diffusion-v2") or metadata.get("ss_v2") == "True":
        return "sd2"
    if version.startswith("sd_") or architecture.startswith("stable-diffusion-v1") or metadata.get("ss_v2") == "False":
        return "sd1"
    return None

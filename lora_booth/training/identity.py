"""What decides a run's result: enough to refuse the state of another run, and to say what differs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch

from .. import __version__
from ..base.base_model import BaseModel
from ..config import LoraSpec, TrainingConfig
from ..photos.photo import Photo
from ..subject.subject import Subject
from .latents import LatentCache

# settings that may change when a run is resumed: those that do not affect the adapter, and those that affect rounding only
FREE = ("checkpoint_every", "checkpoint_minutes", "sample_every", "sample_prompt", "sample_seeds")
ROUNDING = ("pictures_at_a_time", "gradient_checkpointing", "attention", "lean", "capture", "compile")
FORMAT = 2  # of a run's state and record; those of others are refused
PACKAGES = ("torch", "diffusers", "transformers", "peft")


def run_facts(base: BaseModel, subjects: Sequence[Subject], lora: LoraSpec, config: TrainingConfig) -> dict[str, Any]:
    """What a run computes: equal facts give equal adapters in equal `surroundings`. Photos are hashes."""
    return {
        "format": FORMAT,
        "base": {"name": base.name, "fingerprint": base.fingerprint, "dtype": precision_of(base)},
        "lora": as_json(asdict(lora)),
        "config": {k: v for k, v in as_json(asdict(config)).items() if k not in FREE + ROUNDING},
        "subjects": [
            {
                "token": s.token,
                "class_noun": s.class_noun,
                "class_prompt": s.class_prompt,
                "photos": [{"sha256": p.sha256, "use": use_of(p, s.prompt_for(p))} for p in s.photos],
            }
            for s in subjects
        ],
    }


def precision_of(base: BaseModel) -> str:
    return str(base.dtype).removeprefix("torch.") + (f", {base.quantized}" if base.quantized else "")


def use_of(photo: Photo, prompt: str) -> str:
    """A hash of how a photo is used: its prompt, crop and mask, not its name."""
    ignored = ("path", "note", "caption", "mask")
    facts = {f.name: getattr(photo, f.name) for f in fields(photo) if f.name not in ignored}
    mask = getattr(photo, "mask", None)
    text = json.dumps([facts, None if mask is None else mask.sha256, prompt], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity_of(facts: Mapping[str, Any]) -> str:
    """The hash of the facts, without the base's name: a renamed folder is the same base."""
    kept = {**facts, "base": {k: v for k, v in facts["base"].items() if k != "name"}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def surroundings(base: BaseModel, config: TrainingConfig, processes: int) -> dict[str, Any]:
    """Where and how a run is computed; elsewhere, results are equal up to rounding."""
    device = base.device
    return {
        "lora_booth": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        **{name: getattr(config, name) for name in ROUNDING},
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two `run_facts`, in words."""
    found = []
    if before["base"]["fingerprint"] != now["base"]["fingerprint"]:
        found.append(f"base {before['base']['name']} -> {now['base']['name']} (other weights)")
    found += changes({"dtype": before["base"]["dtype"]}, {"dtype": now["base"]["dtype"]})
    for group in ("lora", "config"):
        found += changes(before[group], now[group])
    words = [[{k: s[k] for k in ("token", "class_noun", "class_prompt")} for s in f["subjects"]] for f in (before, now)]
    if len(words[0]) != len(words[1]):
        found.append(f"subjects {len(words[0])} -> {len(words[1])}")
    for old, new in zip(*words, strict=False):
        found += changes(old, new)
    old_photos, new_photos = ([(p["sha256"], p["use"]) for s in f["subjects"] for p in s["photos"]] for f in (before, now))
    old_files, new_files = sorted(p[0] for p in old_photos), sorted(p[0] for p in new_photos)
    if len(old_photos) != len(new_photos):
        found.append(f"photos {len(old_photos)} -> {len(new_photos)}")
    elif old_files != new_files:
        found.append(f"{len(set(new_files) - set(old_files))} of {len(new_files)} photos were replaced or edited")
    elif old_photos != new_photos and not found:
        found.append("the order, a caption, a crop or a mask of the photos")
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{name} {before.get(name)} -> {now.get(name)}" for name in {**before, **now} if before.get(name) != now.get(name)]


def hash_of_latents(cache: LatentCache) -> str:
    digest = hashlib.sha256()
    for items in (cache.photos, cache.class_images):
        if items is not None:
            digest.update(items.mean.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def as_json(facts: dict[str, Any]) -> dict[str, Any]:
    """As they come back from a file, with lists for tuples."""
    back: dict[str, Any] = json.loads(json.dumps(facts))
    return back

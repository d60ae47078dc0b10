"""What a run computes: enough to refuse the state of another run, to say what differs, and to make the adapter of a state."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch

from .. import __version__
from ..adapters.adapter import Adapter
from ..adapters.contents import Card, card_facts
from ..base.base_model import BaseModel
from ..config import LoraSpec, SettledConfig, defaults
from ..injection.trainable import factors_of
from ..photos.photo import Photo
from ..subject.subject import Subject
from .latents import LatentCache

# settings that may change when a run is resumed: those that do not affect the adapter, and those that affect rounding only
FREE = ("checkpoint_every", "checkpoint_minutes", "sample_every", "sample_prompt", "sample_size", "sample_seeds")
ROUNDING = ("pictures_at_a_time", "gradient_checkpointing", "attention", "lean", "capture")
DIGEST_LENGTH = 16  # hex digits
FORMAT = 4  # of a run's state and record; those of others are refused
PACKAGES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Job:
    """What a run computes."""

    base: BaseModel
    subjects: Sequence[Subject]
    lora: LoraSpec
    config: SettledConfig
    init: Adapter | None = None  # to begin with

    @property
    def photos(self) -> int:
        return sum(len(subject.photos) for subject in self.subjects)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Equal facts give equal adapters in equal `surroundings`. As they come back from a file; photos are hashes."""
        found = {
            "format": FORMAT,
            "base": {"name": self.base.name, "fingerprint": self.base.fingerprint, "dtype": self.base.precision},
            "lora": asdict(self.lora),
            "init": self.init and self.init.digest()[:DIGEST_LENGTH],
            "config": {name: value for name, value in asdict(self.config).items() if name not in FREE + ROUNDING},
            "subjects": [
                {
                    "token": s.token,
                    "class_noun": s.class_noun,
                    "class_prompt": s.class_prompt,
                    "photos": [{"sha256": p.sha256, "use": use_of(p, s.prompt_for(p))} for p in s.photos],
                    "class_images": [p.sha256 + use_of(p, s.class_prompt_for(p)) for p in s.class_images],
                }
                for s in self.subjects
            ],
        }
        back: dict[str, Any] = json.loads(json.dumps(found))
        return back

    @cached_property
    def identity(self) -> str:
        """The hash of the facts, without the base's name: a renamed folder is the same base."""
        kept = {**self.facts, "base": {k: v for k, v in self.facts["base"].items() if k != "name"}}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def surroundings(self, cache: LatentCache, processes: int) -> dict[str, Any]:
        """Where and how the run is computed; elsewhere, results are equal up to rounding."""
        device = self.base.device
        latents = hashlib.sha256()
        for bucket in cache.buckets:
            for pictures in filter(None, (bucket.photos, bucket.class_images)):
                latents.update(pictures.mean.cpu().numpy().tobytes())
        return {
            "lora_booth": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            "machine": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "processes": processes,
            **{name: getattr(self.config, name) for name in ROUNDING},
            "latents": latents.hexdigest()[:DIGEST_LENGTH],
        }

    # --- its adapter

    def adapter(self, state: dict[str, Any]) -> Adapter:
        """The adapter of a `TrainingRun.state()`."""
        factors = factors_of(state.get("average") or state["lora"], self.lora.scale_alpha)
        return Adapter(factors, self.card(int(state["step"])))

    def card(self, steps: int) -> Card:
        first = self.subjects[0]
        return Card(
            **card_facts(self.base),
            resolution=self.config.resolution,
            token=first.token,
            class_noun=first.class_noun,
            prompt=first.card_prompt,
            rank=self.lora.rank,
            alpha=self.lora.scale_alpha,
            steps=steps,
            photos=self.photos,
            library_version=__version__,
            init=self.facts["init"],
            title=" and ".join(f"{s.token} {s.class_noun}" for s in self.subjects),
        )


def use_of(photo: Photo, prompt: str) -> str:
    """A hash of how a photo is used: its prompt, crop and mask, not its name."""
    ignored = ("path", "note", "caption", "mask")
    facts = {f.name: getattr(photo, f.name) for f in fields(photo) if f.name not in ignored}
    text = json.dumps([facts, photo.mask and photo.mask.sha256, prompt], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def differences(before: Any, now: Mapping[str, Any]) -> list[str]:
    """What differs between the facts of two jobs, in words. Empty if another version, or somebody by hand, wrote the first."""
    try:
        return list(found_differences(before, now)) if before["format"] == FORMAT else []
    except (KeyError, TypeError, AttributeError):
        return []


def found_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before["base"]["fingerprint"] != now["base"]["fingerprint"]:
        yield f"base {before['base']['name']} -> {now['base']['name']} (other weights)"
    yield from changes({"dtype": before["base"]["dtype"]}, {"dtype": now["base"]["dtype"]})
    yield from changes(before["lora"], now["lora"])
    yield from changes({"init": before["init"]}, {"init": now["init"]})
    photos = [[photo["sha256"] for subject in f["subjects"] for photo in subject["photos"]] for f in (before, now)]
    configs = [before["config"], now["config"]]
    usual = [defaults(len(shas), config["steps"]) for shas, config in zip(photos, configs, strict=True)]
    if all(config["warmup_steps"] == default["warmup_steps"] for config, default in zip(configs, usual, strict=True)):
        configs = [{**config, "warmup_steps": None} for config in configs]  # which follow from the steps: not named
    yield from changes(*configs)
    words = [[{k: s[k] for k in ("token", "class_noun", "class_prompt")} for s in f["subjects"]] for f in (before, now)]
    if len(words[0]) != len(words[1]):
        yield f"subjects {len(words[0])} -> {len(words[1])}"
    for pair in zip(*words, strict=False):
        yield from changes(*pair)
    old, new = photos
    if len(old) != len(new):
        yield f"photos {len(old)} -> {len(new)}"
    elif sorted(old) != sorted(new):
        yield f"{len(set(new) - set(old))} of {len(new)} photos were replaced or edited"
    elif words[0] == words[1] and [s["photos"] for s in before["subjects"]] != [s["photos"] for s in now["subjects"]]:
        yield "the order, a caption, a crop or a mask of the photos"
    if [s["class_images"] for s in before["subjects"]] != [s["class_images"] for s in now["subjects"]]:
        yield "the folder of class images"


def only_steps_differ(before: Any, now: Mapping[str, Any]) -> bool:
    """Whether a run of these facts can be continued as the other one, with another number of steps."""
    try:
        one, other = (
            {**facts, "base": {**facts["base"], "name": ""}, "config": {**facts["config"], "steps": 0, "warmup_steps": 0}}
            for facts in (before, now)
        )
    except (KeyError, TypeError):
        return False
    return one == other


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{name} {before.get(name)} -> {now.get(name)}" for name in {**before, **now} if before.get(name) != now.get(name)]

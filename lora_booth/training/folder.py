"""A run's folder: what it computes (identity), how it was set, its samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from .. import __version__
from ..base_model import BaseModel
from ..config import LoraSpec, TrainingConfig
from ..generation import generate_images
from ..latents import LatentCache
from .modes import modes_kept


def run_identity(base: BaseModel, cache: LatentCache, lora: LoraSpec, config: TrainingConfig) -> str:
    """What a run computes: equal identities give equal adapters on one machine."""
    free = {"checkpoint_every", "sample_every", "sample_prompt"}
    digest = hashlib.sha256()
    facts = {"base": base.fingerprint, "dtype": str(base.dtype), "lora": asdict(lora)}
    facts["config"] = {key: value for key, value in asdict(config).items() if key not in free}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for items in (cache.photos, cache.class_images):
        if items is not None:
            digest.update("\0".join(items.prompts).encode())
            digest.update(items.mean.cpu().numpy().tobytes())
    return digest.hexdigest()


def write_run_file(run: Path, base: BaseModel, lora: LoraSpec, config: TrainingConfig, identity: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    facts = {"lora_booth": __version__, "base": base.name, "identity": identity, "lora": asdict(lora), "config": asdict(config)}
    (run / "run.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def sample(base: BaseModel, prompt: str, path: Path, config: TrainingConfig) -> None:
    """A picture by the U-Net under training, without dropout, on the run's seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with base.all_on_device(), modes_kept(base):
        for model in base.components.values():
            model.eval()
        generate_images(base.pipeline, prompt, [config.seed], size=config.resolution)[0].save(path)

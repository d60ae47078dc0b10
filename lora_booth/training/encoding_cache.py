"""What the VAE and the text encoders said before, kept on disk: they are not even read when all is there.

Pictures and prompts are encoded one at a time, so that an entry does not depend on the company that it was computed in:
a run with the cache computes bit for bit what it computes without. An entry's key has the picture's pixels or the
prompt's tokens, every weight of the module, its settings, precision and device, and the versions of what computes.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..base.base_model import TEXT_ENCODERS, BaseModel, TextConditions
from ..base.weight_files import LazyModule
from ..cache import bytes_of, key_of, read_entry, write_entry
from ..photos.square import to_tensor

UNREAD = ("architectures", "dtype", "name_or_path", "torch_dtype", "transformers_version")  # by what computes


class VaeCache:
    """Latents of pictures by the base's VAE."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    @cached_property
    def facts(self) -> dict[str, Any] | None:
        return facts_of(self.base, "vae")

    def encode(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """A picture -> mean and standard deviation of its latents, each (1, C, H/f, W/f) float32."""
        pixels = to_tensor(image)
        if self.facts is None:
            return self.base.encode_images(pixels)
        picture = hashlib.sha256(bytes_of(pixels)).hexdigest()
        key = key_of(of="latents", picture=picture, shape=tuple(pixels.shape), **self.facts)
        found = read_entry("latents", key)
        if found is None or found.keys() != {"mean", "std"}:
            mean, std = self.base.encode_images(pixels)
            found = {"mean": mean, "std": std}
            if bool(mean.isfinite().all()) and bool(std.isfinite().all()):
                write_entry("latents", key, found)
        device = self.base.device
        return found["mean"].to(device), found["std"].to(device)


class TextCache:
    """Text conditions of prompts by the base's text encoders."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    @cached_property
    def facts(self) -> dict[str, Any] | None:
        each = [facts_of(self.base, name) for name in TEXT_ENCODERS[: self.base.family.text_encoders]]
        return None if None in each else {"encoders": each, "pipeline": type(self.base.shell).__name__}

    def encode(self, prompt: str) -> TextConditions:
        if self.facts is None:
            return self.base.encode_text([prompt])
        tokens = [words([prompt], padding="max_length", truncation=True).input_ids for words in self.base.tokenizers]
        key = key_of(of="text", prompt=prompt, tokens=tokens, **self.facts)
        found = read_entry("text", key)
        if found is None or "states" not in found:
            text = self.base.encode_text([prompt])
            found = {"states": text.states} | ({} if text.pooled is None else {"pooled": text.pooled})
            write_entry("text", key, found)
        device = self.base.device
        pooled = found.get("pooled")
        return TextConditions(found["states"].to(device), None if pooled is None else pooled.to(device))


def facts_of(base: BaseModel, name: str) -> dict[str, Any] | None:
    """All that the outputs of a module depend on, but for its inputs; None: nobody can tell (it has adapters in it)."""
    import diffusers
    import transformers

    module, place = getattr(base.shell, name), base.device
    unread = base.unread(name)
    if any("lora_" in key for key in module.state_dict()):
        return None
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    return {
        "class": type(module).__name__,
        "config": {key: value for key, value in sorted(config.items()) if key[0] != "_" and key not in UNREAD},
        "weights": digest_of(module) if unread is None else digest_on_disk(unread),
        "dtype": str(next(module.parameters()).dtype),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else [place.type, torch.get_num_threads()],
        "modes": {mode: getattr(module, mode, None) for mode in ("training", "use_tiling", "use_slicing")},
        "attention": sorted({type(one).__name__ for one in getattr(module, "attn_processors", {}).values()})
        or getattr(module.config, "_attn_implementation", None),
        "versions": [torch.__version__, diffusers.__version__, transformers.__version__],
    }


def digest_of(module: Any) -> str:
    """sha256 of every weight, as it is in memory."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()


def digest_on_disk(unread: LazyModule) -> str:
    """The same of a module that is not read yet; read once for each state of its files."""
    key = key_of(of="digest", files=unread.stamp(), dtype=unread.dtype)
    found = read_entry("digests", key)
    if found is not None and "sha256" in found:
        return bytes(found["sha256"].tolist()).hex()
    digest = hashlib.sha256()
    for name, place in sorted(unread.places.items()):
        value = place.read(unread.dtype, torch.device("cpu"))
        digest.update(f"{name} {tuple(unread.module.state_dict()[name].shape)}".encode())
        digest.update(bytes_of(value))
    write_entry("digests", key, {"sha256": torch.tensor(list(digest.digest()), dtype=torch.uint8)})
    return digest.hexdigest()

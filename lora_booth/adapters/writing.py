"""Writing adapter files that every program reads alike. Equal adapters give equal bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.families import FAMILIES
from ..base.weight_files import DTYPES as HEADER_DTYPES
from ..base.weight_files import FACTOR_DTYPES
from ..cache import bytes_of
from ..config import typed
from ..errors import AdapterError, AdapterFormatError, AdapterNonFinite, AdapterScaleError
from ..files import replacing
from .contents import MAX_SCALE, AdapterContents, Dtype, Layout, LoraFactors, check_shapes, check_values
from .layouts import KERNEL_3X3, check_path, component_of, kohya_names, tail_of
from .metadata import PEFT_KEY, metadata_of
from .readers import check_readers, opened
from .reading import load

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DTYPE_NAMES = {HEADER_DTYPES[name]: name for name in FACTOR_DTYPES}


def save(adapter: AdapterContents, path: Path, *, layout: Layout, dtype: Dtype) -> Path:
    """See `Adapter.save`."""
    if path.suffix != ".safetensors":
        raise AdapterFormatError("not the name of an adapter file; end it with .safetensors", path)
    typed("layout", layout, Layout)
    typed("dtype", dtype, Dtype)
    if not adapter.modules:
        raise AdapterError("the adapter has no modules; nothing was trained", path)
    content, meant = packed(adapter, layout, DTYPES[dtype], path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            found = load(temporary, allow=meant)
            if found.digest() != replace(adapter, modules=meant).digest():
                raise AdapterFormatError("read back differently from what was written; nothing was changed", path)
            check_readers(opened(temporary, found), layout, path)
    except OSError as error:
        raise AdapterError(f"cannot be written: {error.strerror}; nothing was changed", path) from error
    return path


def packed(adapter: AdapterContents, layout: Layout, dtype: torch.dtype, path: Path) -> tuple[bytes, dict[str, LoraFactors]]:
    """Return a file's bytes, and the factors that reading them gives."""
    for module, factors in adapter.modules.items():
        check_path(module)
        check_shapes(module, tuple(factors.down.shape), tuple(factors.up.shape), path)
    family = adapter.card.family
    modules = {module: _spelled(module, factors, family) for module, factors in adapter.modules.items()}
    if layout == "kohya":
        alphas = _alphas(modules)
        meant = {m: _cast(m, f, alphas[component_of(m)], dtype, path) for m, f in modules.items()}
        names = kohya_names(modules, family)
        tensors = {}
        for module, factors in meant.items():
            tensors[f"{names[module]}.lora_down.weight"] = factors.down
            tensors[f"{names[module]}.lora_up.weight"] = factors.up
            tensors[f"{names[module]}.alpha"] = torch.tensor(factors.alpha, dtype=torch.float32)
    else:
        meant = {m: _cast(m, f, float(f.rank), dtype, path) for m, f in modules.items()}
        tensors = {f"{module}.lora_A.weight": factors.down for module, factors in meant.items()}
        tensors |= {f"{module}.lora_B.weight": factors.up for module, factors in meant.items()}
    # widest dtype first, as the safetensors library does, so that every tensor lies aligned; then by name
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    data = b"".join(bytes_of(tensor) for _, tensor in ordered)
    alpha = Counter(f.alpha for f in meant.values()).most_common(1)[0][0]
    metadata = metadata_of(adapter, layout, alpha, hashlib.sha256(data).hexdigest())
    if layout == "peft":
        metadata |= _peft_entry(meant)
    return _header_bytes(ordered, metadata) + data, meant


def _spelled(module: str, factors: LoraFactors, family: str | None) -> LoraFactors:
    """A linear layer or 1x1 convolution as the family's models have it; diffusers loads no other shape."""
    projection = module.endswith((".proj_in", ".proj_out"))
    if module.endswith(KERNEL_3X3) or (projection and family is None):
        return factors
    convolution = module.endswith(".conv_shortcut") or (projection and not FAMILIES[family or ""].linear_projection)
    return factors.fitted((*factors.shape[:2], *((1, 1) if convolution else ()))) or factors


def _alphas(modules: Mapping[str, LoraFactors]) -> dict[str, float]:
    """One alpha for each component: diffusers uses the most common one for all of its modules."""
    chosen = {}
    for component in {component_of(module) for module in modules}:
        members = [f for m, f in modules.items() if component_of(m) == component]
        counts = Counter(f.alpha for f in members if f.alpha != 0)
        alpha = max(counts, key=lambda a: (counts[a], a)) if counts else float(members[0].rank)
        limit = MAX_SCALE * min(f.rank for f in members)
        chosen[component] = torch.tensor(max(-limit, min(limit, alpha)), dtype=torch.float32).item()
    return chosen


def _cast(module: str, factors: LoraFactors, alpha: float, dtype: torch.dtype, path: Path) -> LoraFactors:
    """The same change with another alpha, which `up` makes up for."""
    if not math.isfinite(factors.alpha):
        raise AdapterScaleError(f"{module}: alpha {factors.alpha:g} is not finite", path)
    ratio = factors.alpha / alpha
    down, up = (t.detach().cpu().float() for t in (factors.down, factors.up))
    cast = LoraFactors(down.to(dtype), (up if ratio == 1 else up * ratio).to(dtype), alpha)
    for tensor, name in ((cast.down, "lora_down"), (cast.up, "lora_up")):
        if not torch.isfinite(tensor).all():
            raise AdapterNonFinite(f"{module}: {name} is not finite as {DTYPE_NAMES[dtype]}; try dtype fp32", path)
        check_values(module, tensor, path)
    return cast


def _peft_entry(modules: Mapping[str, LoraFactors]) -> dict[str, str]:
    """The minimum that diffusers accepts as a LoraConfig. Without it, diffusers assumes alpha = rank, which is right here."""
    fields: dict[str, Any] = {}
    for component in sorted({component_of(module) for module in modules}):
        # without text_model., which transformers 5 dropped: PEFT matches the end of a path
        ranks = {
            m.split(".", 1)[1].removeprefix("text_model."): f.rank for m, f in modules.items() if component_of(m) == component
        }
        rank = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
        fields[f"{component}.r"] = fields[f"{component}.lora_alpha"] = rank
        fields[f"{component}.target_modules"] = sorted({tail_of(module) for module in ranks})
        others = {module: other for module, other in ranks.items() if other != rank}
        if others:
            fields[f"{component}.rank_pattern"] = fields[f"{component}.alpha_pattern"] = others
    return {PEFT_KEY: json.dumps(fields, sort_keys=True)}


def _header_bytes(ordered: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """The length and the header, padded to 8 bytes. (The safetensors library writes metadata in random order.)"""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

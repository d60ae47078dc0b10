"""Adapter files from strangers: everything is checked, under limits of our own, before anyone gets a tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..base.families import labels
from ..base.safetensors_header import ADAPTER, FACTOR_DTYPES, Header, read_header
from ..errors import AdapterBaseMismatch, AdapterDtypeError, AdapterFormatError, AdapterIncomplete, AdapterTooLarge
from . import lycoris
from .adapter import Adapter, LoraFactors
from .checks import check_scale, check_shapes, check_values
from .files import find, open_regular
from .header import PEFT_KEY, card_from, clean
from .layouts import SGM_KEYS, Role, are_pair, understood
from .peft_config import PeftConfig

TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,  # some tools save alpha so
}


def load(path: Path, *, allow: Collection[str] = (), stem: str | None = None) -> Adapter:
    """The adapter in a file or folder; see `Adapter.load`."""
    file, config = find(path)
    with open_regular(file) as handle:
        return read(handle, os.fstat(handle.fileno()).st_size, file, config=config, allow=allow, stem=stem)


def read(
    handle: BinaryIO,
    size: int,
    path: Path,
    *,
    config: Path | None = None,
    allow: Collection[str] = (),
    stem: str | None = None,
) -> Adapter:
    """The adapter in `size` bytes, read once from start to end. path: for messages and the adapter's name."""
    header = read_header(handle, size, path)
    named = _named(header, allow, path)
    plans = {module: _plan(module, keys, header, path) for module, keys in named.items()}
    expanded = sum(4 * (math.prod(p.down) + math.prod(p.up)) for p in plans.values() if p.kind != lycoris.LORA)
    if expanded > ADAPTER.file:
        raise AdapterTooLarge(f"its LoHa or LoKr has {expanded} bytes as LoRA; allowed: {ADAPTER.file}", path)
    peft = PeftConfig.read(header.metadata.get(PEFT_KEY), config, path)
    modules, shapes = {}, {}
    for module, keys in sorted(named.items()):
        modules[module] = _read_module(module, keys, plans[module], header, handle, peft, path)
        shapes[module] = tuple(modules[module].down.shape)
    sgm = any(key.startswith(SGM_KEYS) for key in header.tensors)
    return Adapter(modules, card_from(header.metadata, shapes, sgm=sgm), clean(path.stem if stem is None else stem))


def _named(header: Header, allow: Collection[str], path: Path) -> dict[str, dict[Role, str]]:
    """Canonical module -> role -> key; no tensor named twice, every dtype allowed."""
    named: dict[str, dict[Role, str]] = {}
    for key, entry in header.tensors.items():
        module, role = understood(key, allow=allow, path=path)
        roles = named.setdefault(module, {})
        if role in roles:
            raise AdapterFormatError(f"{key} and {roles[role]} name the same tensor", path)
        roles[role] = key
        if entry.dtype not in (TORCH_DTYPES if role == "alpha" else FACTOR_DTYPES):
            raise AdapterDtypeError(f"{key}: dtype {entry.dtype}; allowed: {', '.join(FACTOR_DTYPES)}", path)
        if role == "alpha" and math.prod(entry.shape) != 1:
            raise AdapterFormatError(f"{key} is not one number", path)
    if not named:
        raise AdapterBaseMismatch(f"no LoRA tensors in it: not made for {labels()}", path)
    return named


def _plan(module: str, keys: Mapping[Role, str], header: Header, path: Path) -> lycoris.Plan:
    """What the module's factors will be: every pair whole, no rank too large."""
    plan = lycoris.plan(module, {role: header.tensors[key].shape for role, key in keys.items() if role != "alpha"}, path)
    if "down" in keys and not are_pair(keys["down"], keys["up"]):
        raise AdapterIncomplete(f"{keys['down']} and {keys['up']} are named in two ways: no pair", path)
    what = module if plan.kind == lycoris.LORA else f"{module} is {plan.kind}, as LoRA"
    check_shapes(what, plan.down, plan.up, path)
    return plan


def _read_module(
    module: str, keys: Mapping[Role, str], plan: lycoris.Plan, header: Header, handle: BinaryIO, peft: PeftConfig, path: Path
) -> LoraFactors:
    tensors = {role: _tensor(header, key, handle, path) for role, key in keys.items()}
    given = tensors.pop("alpha", None)
    if given is not None:
        alpha = float(given.item())
    else:
        alpha = peft.alpha(module, plan.rank, lycoris=plan.kind in (lycoris.LOHA, lycoris.LOKR))
    if plan.rank is None and given is not None and math.isfinite(alpha):
        alpha = 1.0  # LyCORIS and those who read its files scale only low-rank parts
    check_scale(module, alpha, plan.rank or 1, path)
    for tensor in tensors.values():
        check_values(module, tensor, path)
    down, up = lycoris.factors(plan, tensors)
    rank = down.shape[0]
    if plan.kind != lycoris.LORA:
        for tensor in (down, up):
            check_values(module, tensor, path)
        alpha = alpha if plan.rank == rank else alpha / (plan.rank or 1) * rank
    elif up.ndim != down.ndim:
        up = up.flatten(1) if down.ndim == 2 else up[:, :, None, None]
    return LoraFactors(down, up, alpha)


def _tensor(header: Header, key: str, handle: BinaryIO, path: Path) -> Tensor:
    entry = header.tensors[key]
    content = bytearray(entry.end - entry.start)
    handle.seek(header.data_start + entry.start)
    if handle.readinto(content) != len(content):  # type: ignore[attr-defined]  # of a buffered reader
        raise AdapterFormatError("became shorter while it was read", path)
    return torch.frombuffer(content, dtype=TORCH_DTYPES[entry.dtype]).reshape(entry.shape)

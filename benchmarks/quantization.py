"""Ways to keep frozen linear layers in 8 or 4 bits under a LoRA: error, memory for the backward pass, time.

pip install bitsandbytes torchao && python benchmarks/quantization.py [--device cuda]

The error is that of the toybox's own weights. Kept and timed are six feed-forward blocks, 1280 -> 5120 -> 1280, in bf16 with
256 tokens: stock PEFT layers around the library's, without lean forwards and without gradient checkpointing. On a CPU the time
is what the process computed, whatever else runs there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import lora_booth as lb
from lora_booth.base.quantization import quantize

BF16 = torch.bfloat16
REPEATS = 7


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(1280), nn.Linear(1280, 5120), nn.Linear(5120, 1280)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))  # type: ignore[no-any-return]


def bitsandbytes_int8(model: nn.Module) -> None:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            made = Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            device = layer.weight.device
            made.weight = Int8Params(layer.weight.data.half().cpu(), has_fp16_weights=False, requires_grad=False).to(device)
            made.bias = layer.bias
            model.set_submodule(name, made)
    model.is_loaded_in_8bit = True  # type: ignore[assignment]


def torchao(kind: str) -> Callable[[nn.Module], None]:
    def work(model: nn.Module) -> None:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, f"{kind}WeightOnlyConfig")())

    return work


def nf4(model: nn.Module) -> None:
    quantize(model, None, BF16, "nf4")
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "bf16": lambda model: None,
    "int8": lambda model: quantize(model, None, BF16, "int8"),
    "int8 of torchao": torchao("Int8"),
    "int8 of bitsandbytes": bitsandbytes_int8,
    "fp8 of torchao": torchao("Float8"),
    "nf4": nf4,
}


def error(way: Callable[[nn.Module], None], device: str) -> float:
    """Of the toybox's linear layers: root mean square, as a share of the weights' own, by what the layers compute."""
    unet = lb.BaseModel.load("toybox", dtype=torch.float32).unet
    plain = {name.replace(".", "/"): layer for name, layer in unet.named_modules() if type(layer) is nn.Linear}
    layers = nn.ModuleDict({name: copy.deepcopy(layer) for name, layer in plain.items()}).to(device, BF16).requires_grad_(False)
    for layer in layers.values():
        layer.bias = None
    way(layers)
    found = []
    for layer, exact in zip(layers.values(), plain.values(), strict=True):
        weight = layer(torch.eye(exact.in_features, dtype=BF16, device=device)).T.float().cpu()
        found.append(((weight - exact.weight).norm() / exact.weight.norm()).item())
    return statistics.mean(found)


def kept_and_time(way: Callable[[nn.Module], None], device: str) -> tuple[float, float, float]:
    """MB of weights, MB that autograd keeps beside them, milliseconds of a forward and a backward pass."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(Block() for _ in range(6))).to(device, BF16).requires_grad_(False)
    x = torch.randn(1, 256, 1280, device=device, dtype=BF16, requires_grad=True)
    way(model)
    weights = {part.untyped_storage().data_ptr(): part.nbytes for value in model.parameters() for part in parts(value)}
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["wide", "narrow"]), model)
    kept: dict[int, int] = {}
    own = weights | {part.untyped_storage().data_ptr(): 0 for value in model.parameters() for part in parts(value)}

    def keep(tensor: Tensor) -> Tensor:
        for part in parts(tensor):
            if part.untyped_storage().data_ptr() not in own:
                kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x).float().square().mean()
    del loss
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(REPEATS):
        began = clock()
        model(x).float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
    return sum(weights.values()) / 1e6, sum(kept.values()) / 1e6, statistics.median(times) * 1e3


def parts(tensor: Tensor) -> list[Tensor]:
    """The tensors with storage of a tensor, which may be one of torchao's."""
    names = getattr(tensor, "tensor_data_names", None)
    return [tensor] if names is None else [getattr(tensor, name) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    for name, way in WAYS.items():
        try:
            off, (weights, kept, ms) = error(way, device), kept_and_time(way, device)
        except ImportError as reason:
            print(f"{name}: {reason}")
            continue
        print(f"{name}: error {off:.2%}; weights {weights:.0f} MB, kept {kept:.0f} MB; {ms:.0f} ms", flush=True)


if __name__ == "__main__":
    main()

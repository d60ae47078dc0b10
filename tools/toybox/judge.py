"""The judge's stage: renders -> what `world.py` drew there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_booth.toybox.judge import NONE, OBJECT_HEADS, OBJECTS, SCENE_HEADS, JudgeNet
from lora_booth.toybox.scenery import CONTEXTS
from lora_booth.toybox.world import STYLES, Scene

from . import pictures
from .pictures import to_tensor
from .stages import Stage, run_stage

JUDGE_STAGE = Stage("judge", steps=7000, batch=64, rate=2e-3)


def labels(scene: Scene) -> list[int]:
    """Class indices for every head; -100 (ignored) for the attributes of an absent object."""
    indices: list[int] = []
    for slot in range(OBJECTS):
        present = slot < len(scene.objects)
        for name, values in OBJECT_HEADS.items():
            if present:
                indices.append(values.index(getattr(scene.objects[slot], name)))
            else:
                indices.append(values.index(NONE) if name == "class_noun" else -100)
    return [*indices, CONTEXTS.index(scene.context), STYLES.index(scene.style)]


def judge_loss(net: nn.Module, pixels: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the heads. pixels (N, 3, 64, 64), targets (N, heads) int64."""
    logits, _ = net(pixels)
    losses = [F.cross_entropy(head, targets[:, i], ignore_index=-100) for i, head in enumerate(logits)]
    return torch.stack([loss for loss in losses if loss.isfinite()]).mean()  # a batch may have no second object


def worn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Renders (N, 3, H, W) in -1..1 as a generator might have drawn them: moved, bent, softer, blotched, of other light, and
    with parts that belong elsewhere.

    On renders alone the judge learns places and edges by heart: moved by 3 of 64 pixels, a third of them was misread. And by
    a single part: a robot whose hat covered its eyes was read as a mug.
    """
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((n, *shape), generator=generator)

    def coarse(channels: int, side: int) -> Tensor:
        noise = torch.randn((n, channels, side, side), generator=generator)
        return F.interpolate(noise, x.shape[-2:], mode="bicubic", align_corners=False)

    angle, scale = uniform(-0.17, 0.17), uniform(0.9, 1.1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2) * scale.view(n, 1, 1)
    move = torch.cat([turn, uniform(-0.1, 0.1, 2, 1)], 2)
    bend = uniform(0, 0.05, 1, 1, 1) * coarse(2, 6)
    grid = F.affine_grid(move, list(x.shape), align_corners=False) + bend.permute(0, 2, 3, 1)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    strange = (4 * (coarse(1, 5) - uniform(0.8, 2.5, 1, 1, 1))).sigmoid()  # blots, a fifteenth of the area
    x = x.lerp(x.roll(1, 0), strange)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = x.lerp(soft, uniform(0, 1, 1, 1, 1))
    x = x * uniform(0.88, 1.12, 3, 1, 1) + uniform(-0.08, 0.08, 1, 1, 1)
    x = x + uniform(0, 0.1, 1, 1, 1) * coarse(3, 8)
    return x + uniform(0, 0.08, 1, 1, 1) * torch.randn(x.shape, generator=generator)


def train_judge(work: Path, device: torch.device, log: dict[str, Any]) -> nn.Module:
    renders, held_out = (pictures.PLAIN, pictures.NAMED), pictures.HELD_OUT.pictures(work)
    drawn = np.concatenate([part.pictures(work) for part in renders])  # with 40,000 alone it learnt them by heart
    targets = torch.tensor([labels(scene) for part in renders for scene in part.scenes()])
    held_out_targets = torch.tensor([labels(scene) for scene in pictures.HELD_OUT.scenes()])

    def loss_of(net: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(drawn), (JUDGE_STAGE.batch,), generator=generator).sort().values
        x = worn(to_tensor(drawn[index.numpy()]), generator)
        with torch.autocast(device.type, torch.bfloat16):
            return judge_loss(net, x.to(device, memory_format=torch.channels_last), targets[index].to(device))

    def evaluate(net: nn.Module) -> dict[str, float]:
        names = [f"{slot}.{name}" for slot in ("first", "second") for name in OBJECT_HEADS] + list(SCENE_HEADS)
        plain, found = to_tensor(held_out), {}
        for what, x in {"renders": plain, "worn": worn(plain, torch.Generator().manual_seed(0))}.items():
            with torch.no_grad():
                logits, _ = net(x.to(device))
            for name, head, t in zip(names, logits, held_out_targets.T, strict=True):
                right = (head.argmax(1).cpu() == t)[t != -100].float().mean()
                found[f"{what}.{name}"] = round(right.item(), 4)
        return found

    net: Any = JudgeNet()
    net.to(device, memory_format=torch.channels_last)
    return run_stage(JUDGE_STAGE, net, loss_of, work, log, evaluate=evaluate)

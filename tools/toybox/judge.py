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

JUDGE_STAGE = Stage("judge", steps=6000, batch=64, rate=2e-3)


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


def train_judge(work: Path, device: torch.device, log: dict[str, Any]) -> nn.Module:
    renders, held_out = (pictures.PLAIN, pictures.NAMED), pictures.HELD_OUT.pictures(work)
    drawn = np.concatenate([part.pictures(work) for part in renders])  # with 40,000 alone it learnt them by heart
    targets = torch.tensor([labels(scene) for part in renders for scene in part.scenes()])
    held_out_targets = torch.tensor([labels(scene) for scene in pictures.HELD_OUT.scenes()])

    def loss_of(net: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(drawn), (JUDGE_STAGE.batch,), generator=generator).sort().values
        x = to_tensor(drawn[index.numpy()])
        if step % 2:  # generated pictures are softer than renders
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = x + 0.08 * torch.rand((), generator=generator) * torch.randn(x.shape, generator=generator)
        with torch.autocast(device.type, torch.bfloat16):
            return judge_loss(net, x.to(device, memory_format=torch.channels_last), targets[index].to(device))

    def evaluate(net: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            logits, _ = net(to_tensor(held_out).to(device))
        names = [f"{slot}.{name}" for slot in ("first", "second") for name in OBJECT_HEADS] + list(SCENE_HEADS)
        right = [
            (head.argmax(1).cpu() == t)[t != -100].float().mean() for head, t in zip(logits, held_out_targets.T, strict=True)
        ]
        return {f"accuracy.{name}": round(value.item(), 4) for name, value in zip(names, right, strict=True)}

    net: Any = JudgeNet()
    net.to(device, memory_format=torch.channels_last)
    return run_stage(JUDGE_STAGE, net, loss_of, work, log, evaluate=evaluate)

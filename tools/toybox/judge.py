"""The judge's stage: renders -> what `world.py` drew there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_booth.toybox.judge import OBJECT_HEADS, SCENE_HEADS, JudgeNet, judge_loss, labels

from . import pictures
from .pictures import to_tensor
from .stages import Stage, run_stage

JUDGE_STAGE = Stage("judge", steps=6000, batch=64, rate=2e-3)


def train_judge(work: Path, device: torch.device, log: dict[str, Any]) -> nn.Module:
    drawn, held_out = pictures.PLAIN.pictures(work), pictures.HELD_OUT.pictures(work)
    targets = torch.tensor([labels(scene) for scene in pictures.PLAIN.scenes()])
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

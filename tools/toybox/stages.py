"""A training stage: fixed steps, cosine rate, moving average, resume."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int
    rate: float  # AdamW, warmed up over 2 % of the steps, then cosine to 0
    ema: float = 0.999


def run_stage(
    stage: Stage,
    model: nn.Module,
    loss_of: Callable[[Any, int, torch.Generator], Tensor],
    work: Path,
    log: dict[str, Any],
    *,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
) -> Any:
    """Train `model`; return its moving average. Every random draw comes from (stage, step), so resuming is exact."""
    device = next(model.parameters()).device
    done, state_file = work / f"{stage.name}.pt", work / f"{stage.name}.state.pt"
    average = copy.deepcopy(model).requires_grad_(False).eval()
    if done.exists():
        average.load_state_dict(torch.load(done, map_location=device, weights_only=True))
        return average
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    decayed = [p for n, p in model.named_parameters() if not (p.ndim < 2 or "embedding" in n)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.99), fused=True)
    first, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    started, saved, losses = time.time(), time.time(), []
    for step in range(first, stage.steps):
        warm = min(1.0, (step + 1) / (0.02 * stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * warm * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        loss = loss_of(model, step, torch.Generator().manual_seed(step * 1_000_003 + sum(map(ord, stage.name))))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(stage.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = spent + time.time() - started
            left = (stage.steps - step - 1) * (time.time() - started) / (step + 1 - first)
            mean_loss = sum(losses[-100:]) / len(losses[-100:])
            print(
                f"{stage.name} {step + 1}/{stage.steps}  loss {mean_loss:.4f}  {seconds:.0f} s, {left:.0f} s left", flush=True
            )
        if time.time() - saved > 120 or step + 1 == stage.steps:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save(state | {"step": step + 1, "seconds": spent + time.time() - started}, state_file)
            saved = time.time()
    log[stage.name] = {"steps": stage.steps, "batch": stage.batch, "rate": stage.rate}
    log[stage.name] |= {
        "seconds": round(spent + time.time() - started),
        "loss": sum(losses[-200:]) / max(1, len(losses[-200:])),
    }
    log[stage.name]["parameters"] = sum(p.numel() for p in model.parameters())
    if evaluate is not None:
        log[stage.name] |= evaluate(average)
    print(json.dumps(log[stage.name]), flush=True)
    (work / "log.json").write_text(json.dumps(log, indent=1))
    save(average.state_dict(), done)
    state_file.unlink(missing_ok=True)
    return average


def save(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)

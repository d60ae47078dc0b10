"""Losses, rates and samples for accelerate's trackers. A tracker that fails never ends a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import MissingExtraError, SettingsError, reason_of, setting
from .progress import Step

AT_ONCE = 16  # losses read together, since each look waits for the device: chosen
LOGS = "logs"  # in the run's folder

Row = tuple[str, int]  # prompt and seed of a sample
Track = Any  # a name, a GeneralTracker of accelerate, or a sequence of these


def trackers_of(track: Track, out: Path | None) -> list[Any]:
    """Not started yet. Raises SettingsError, MissingExtraError for what cannot be had."""
    from accelerate import tracking

    asked = track if isinstance(track, list | tuple | set) else [track]
    known = {str(name): kind for name, kind in tracking.LOGGER_TYPE_TO_CLASS.items()}
    there = {str(name) for name in tracking.get_available_trackers()}
    found = []
    for one in asked:
        if isinstance(one, tracking.GeneralTracker):
            found.append(one)
            continue
        if one not in known:
            raise SettingsError(
                f"track {one!r} is unknown; allowed: {', '.join(sorted(known))}, or a tracker of accelerate's kind"
            )
        if one not in there:
            if one == "tensorboard":
                raise MissingExtraError(setting("track", one), "tensorboard")
            raise SettingsError(f"{setting('track', one)} needs its package; pip install {one}")
        name = "lora_booth" if out is None else out.resolve().name
        if known[one].requires_logging_directory:
            if out is None:
                raise SettingsError(f"{setting('track', one)} writes files into the run folder; pass {setting('out')}")
            found.append(known[one](name, str(out / LOGS)))
        else:
            found.append(known[one](name))
    return found


class Tracking:
    """Starts the trackers. say: called with one line when a tracker fails; it is not used from then on."""

    def __init__(self, trackers: Sequence[Any], settings: Mapping[str, Any], *, say: Callable[[str], None]) -> None:
        self.trackers, self.say = list(trackers), say
        self._steps: list[Step] = []
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        self._each(lambda tracker: getattr(tracker, "start", lambda: None)())
        self._each(lambda tracker: tracker.store_init_configuration(plain))

    def update(self, step: Step) -> None:
        self._steps.append(step)
        if len(self._steps) >= AT_ONCE or step.index == step.total:
            self._log()

    def samples(self, step: int, rows: Sequence[Row], images: Sequence[Image.Image]) -> None:
        self._log()
        for (prompt, seed), image in zip(rows, images, strict=True):
            name = f"{prompt}, seed {seed}"
            self._each(lambda tracker, name=name, image=image: log_image(tracker, name, image, step))  # type: ignore[misc]

    def close(self) -> None:
        self._log()
        self._each(lambda tracker: tracker.finish())

    def _log(self) -> None:
        steps, self._steps = self._steps, []
        if not (steps and self.trackers):
            return
        losses = torch.stack([step.loss_tensor for step in steps]).tolist()
        for step, loss in zip(steps, losses, strict=True):
            values = {"learning_rate": step.learning_rate} | ({"loss": loss} if math.isfinite(loss) else {})
            self._each(lambda tracker, values=values, at=step.index: tracker.log(values, step=at))  # type: ignore[misc]

    def _each(self, act: Callable[[Any], Any]) -> None:
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self.say(f"tracker {getattr(tracker, 'name', '?')} is no longer used: {reason_of(error)}")


def log_image(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    """Trackers that show pictures have `log_images`; TensorBoard's wants an array."""
    if not hasattr(tracker, "log_images"):
        return
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, dataformats="NHWC")
    else:
        tracker.log_images({name: [image]}, step=step)

"""Pictures that callers wait for, and the one thread that uses the base: it draws them in batches."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..adapters.adapter import Adapter
from ..base.base_model import BaseModel
from ..base.generation import pictures_at_a_time
from ..errors import CompositionWarning, SettingsError
from ..pictures.composition import Composition
from ..pictures.picture import Picture
from ..pictures.regions import Region
from ..pictures.serving import Request, Serving
from .limits import Limits
from .shelf import Shelf

GATHERING = 0.05  # of the time of a batch, in which others may join the next one; chosen


Box = tuple[float, float, float, float]  # of a `Region`


class How(NamedTuple):
    """What all pictures of a batch have in common."""

    size: tuple[int, int]  # width, height
    steps: int
    guidance: float
    sampler: str | None
    regions: Literal["auto"] | tuple[tuple[str, Box], ...] | None = None  # names of adapters with boxes; drawn by itself


@dataclass(frozen=True, eq=False)
class Wanted:
    """One picture. adapters: names with weights; None: the weight of the adapter's card"""

    prompt: str
    negative_prompt: str | None
    adapters: Mapping[str, float | None]
    seed: int
    how: How
    future: Future[Picture] = field(default_factory=Future)


def composition(base: BaseModel, adapters: Mapping[str, tuple[Adapter, float]], regions: Any) -> Composition:
    """regions: of a `How`"""
    if regions == "auto":
        return Composition(base, adapters.values(), regions="auto")
    boxes = dict(regions)
    placed = [Region(adapter, box=boxes[name], weight=w) for name, (adapter, w) in adapters.items() if name in boxes]
    return Composition(base, [one for name, one in adapters.items() if name not in boxes], regions=placed)


class Queue:
    """Every future that is added gets a picture or an error, unless it is cancelled before. Nothing is drawn for those that
    are cancelled: a batch ends once all of its futures are.

    on_batch  called with the number of pictures of each batch
    """

    def __init__(self, base: BaseModel, shelf: Shelf, limits: Limits, on_batch: Callable[[int], None]) -> None:
        self.base, self.shelf, self.limits, self.on_batch = base, shelf, limits, on_batch
        self.thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self.waiting: list[Wanted] = []
        self.loaded: dict[str, tuple[int, int]] = {}  # name -> time and size of its file; the one used last comes last
        self.seconds = 1.0  # that the last batch took
        self._changed = threading.Condition()
        self._closed = False

    def add(self, pictures: Sequence[Wanted]) -> bool:
        """False, and none is added, if the queue is full."""
        with self._changed:
            if len(self.waiting) + len(pictures) > self.limits.queue:
                return False
            self.waiting += pictures
            self._changed.notify_all()
        for one in pictures:
            one.future.add_done_callback(self._leave)
        return True

    def _leave(self, future: Future[Picture]) -> None:
        with self._changed:
            self.waiting = [one for one in self.waiting if one.future is not future]

    def close(self) -> None:
        """After the batch that is being drawn. What waits is cancelled."""
        with self._changed:
            self._closed = True
            for one in self.waiting:
                one.future.cancel()
            self._changed.notify_all()
        self.thread.join()

    # --- the thread

    def _run(self) -> None:
        with Serving(self.base) as live:
            while not self._closed:
                self._draw(live, self._next())

    def _next(self) -> list[Wanted]:
        """The picture that has waited longest, and those that can share its batch."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self._closed)
            if self._closed:
                return []
            how = self.waiting[0].how
            most = 1 if how.regions else pictures_at_a_time(*how.size)
            full = lambda: sum(one.how == how for one in self.waiting) >= most  # noqa: E731
            self._changed.wait_for(full, timeout=GATHERING * self.seconds)
            batch = [one for one in self.waiting if one.how == how][:most]
            self.waiting = [one for one in self.waiting if one not in batch]
        return batch

    def _draw(self, live: Serving, batch: Sequence[Wanted]) -> None:
        batch = [one for one in batch if not one.future.cancelled()]
        if not batch:
            return
        began = time.monotonic()
        try:
            pictures = self._pictures(live, batch)
        except Exception as error:
            if len(batch) > 1:  # an adapter that cannot be read, or too little memory: the others can be drawn
                for one in batch:
                    self._draw(live, [one])
            elif batch[0].future.set_running_or_notify_cancel():
                batch[0].future.set_exception(error.with_traceback(None))  # which holds tensors
            return
        for one, picture in zip(batch, pictures, strict=True):
            if one.future.set_running_or_notify_cancel():
                one.future.set_result(picture)
        self.seconds = time.monotonic() - began
        self.on_batch(len(batch))

    def _pictures(self, live: Serving, batch: Sequence[Wanted]) -> list[Picture]:
        def step_done(_: int) -> None:
            if all(one.future.cancelled() for one in batch):
                raise CancelledError

        self._load(live, dict.fromkeys(name for one in batch for name in one.adapters))
        how = batch[0].how._asdict() | {"on_step": step_done}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompositionWarning)  # on the words of callers, who would not see it
            if (regions := how.pop("regions")) is not None:
                [one] = batch
                studio = composition(self.base, self._adapters(live, one), regions)
                return studio.generate(one.prompt, seeds=[one.seed], negative_prompt=one.negative_prompt, **how)
            weights = [{name: weight for name, (_, weight) in self._adapters(live, one).items()} for one in batch]
            requests = [Request(one.prompt, w, one.seed, one.negative_prompt) for one, w in zip(batch, weights, strict=True)]
            return live.generate(requests, **how)

    def _adapters(self, live: Serving, wanted: Wanted) -> dict[str, tuple[Adapter, float]]:
        loaded = {name: (live.loaded[name].adapter, weight) for name, weight in wanted.adapters.items()}
        return {name: (one, one.card.weight if weight is None else weight) for name, (one, weight) in loaded.items()}

    def _load(self, live: Serving, names: Iterable[str]) -> None:
        """Also again, if a file has changed. Where there are too many, others go."""
        for name in names:
            file = self.shelf.file(name)
            if file is None:
                raise SettingsError(f"adapter {name!r} is gone")
            stamp, before = (file.stat().st_mtime_ns, file.stat().st_size), self.loaded.pop(name, None)
            if before != stamp:
                if name in live.loaded:
                    live.unload(name)
                live.load(name, self.shelf.read(file, name))
            self.loaded[name] = stamp
        spare = [name for name in self.loaded if name not in names]
        for name in spare[: max(0, len(self.loaded) - self.limits.loaded)]:
            live.unload(name)
            del self.loaded[name]

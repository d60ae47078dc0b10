"""Several processes at one run, as `accelerate launch` or `torchrun` start them: each takes its share of every batch."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import TrainingError

T = TypeVar("T")

BEAT = 2.0  # seconds between two signs of life of a process
LOST = 30.0  # seconds without one: the process is lost
LONGEST = timedelta(hours=2)  # that a living process may keep the others waiting: class images on a slow machine


@dataclass(frozen=True)
class Ranks:
    """The processes of a run and the place of this one. Alone, nothing is sent and nothing waits."""

    rank: int = 0
    count: int = 1
    control: Any = None  # a gloo group, for words between the hosts
    gradients: Any = None  # the group of the gradients; None: the default one

    @property
    def main(self) -> bool:
        """This one writes and shows."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Its rows of a batch. Losses of parts add up, so fewer rows than processes do no harm: some have none."""
        return slice(self.rank, None, self.count)

    def add_up(self, loss: Tensor, gradient: Tensor) -> Tensor:
        """Gradient (n,) and loss () of all shares, summed; the gradient in place, the loss returned."""
        if self.count == 1:
            return loss
        both = torch.cat([loss.reshape(1), gradient])
        with lost_is_told():
            dist.all_reduce(both, group=self.gradients)
        gradient.copy_(both[1:])
        return both[0]

    def highest(self, number: int) -> int:
        """The highest number that any process gives: so all of them stop at the same step."""
        if self.count == 1:
            return number
        all_of_them = torch.tensor(number)
        with lost_is_told():
            dist.all_reduce(all_of_them, op=dist.ReduceOp.MAX, group=self.control)
        return int(all_of_them)

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in the main process, for all; an error there is an error everywhere."""
        if self.count == 1:
            return work()
        if not self.main:
            with lost_is_told():
                told: list[Any] = [None]
                dist.broadcast_object_list(told, group=self.control)
            error, given = told[0]
            if error is not None:
                raise TrainingError(error)
            return given  # type: ignore[no-any-return]
        try:
            result = work()
        except BaseException as error:
            dist.broadcast_object_list([(f"the main process stopped: {error}", None)], group=self.control)
            raise
        with lost_is_told():
            dist.broadcast_object_list([(None, result)], group=self.control)
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """`work` in every process, the main one before the others: what it has kept (class images), they find."""
        made: list[T] = []
        self.from_main(lambda: made.append(work()))
        return made[0] if made else work()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Meanwhile each process gives signs of life, and one that misses another's for LOST seconds ends: a sum of gradients
        would wait for hours. What it had saved is whole. (A process that dies closes its connections and is missed at once.)
        """
        if self.count == 1 or "MASTER_ADDR" not in os.environ:
            yield
            return
        done = threading.Event()
        watcher = threading.Thread(target=watch, args=(self.rank, self.count, next_call(), done), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join(BEAT)


ALONE = Ranks()


def started() -> bool:
    """A launcher has started several processes of this program."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """Before `joined`: this is the process that writes and shows."""
    return not started() or os.environ["RANK"] == "0"


def own_gpu() -> None:
    """Before a base is loaded: each process on a GPU of its own, as far as there are so many."""
    if started() and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def joined(device: torch.device) -> Ranks:
    """The processes that a launcher has started with this one, or ALONE. device: of the base."""
    if not dist.is_available() or not (started() or dist.is_initialized()):
        return ALONE
    return joined_on(device)


@cache
def joined_on(device: torch.device) -> Ranks:
    if not dist.is_initialized():  # a program of accelerate's may have done it
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST)
        atexit.register(dist.destroy_process_group)
    rank, count = dist.get_rank(), dist.get_world_size()
    if count == 1:
        return ALONE
    control = dist.new_group(backend="gloo", timeout=LONGEST)
    places: list[Any] = [None] * count
    dist.all_gather_object(places, (socket.gethostname(), str(device)), group=control)
    shared = device.type == "cuda" and len(set(places)) < count  # nccl wants a GPU for each
    return Ranks(rank, count, control=control, gradients=control if shared or device.type != "cuda" else None)


@contextmanager
def lost_is_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError("another process of this run was lost; the same command continues it") from error


_calls = 0


def next_call() -> int:
    """Trainings in one program must not read each other's signs of life."""
    global _calls
    _calls += 1
    return _calls


def watch(rank: int, count: int, call: int, done: threading.Event) -> None:
    """End this process when another has not been heard for LOST seconds. The listening is in a thread of its own: it waits for
    ever where the process that keeps the store has stopped without closing its connections."""
    heard = {other: time.monotonic() for other in range(count) if other != rank}
    gone = threading.Event()
    threading.Thread(target=listen, args=(rank, call, heard, done, gone), daemon=True).start()
    while not (done.wait(BEAT) or gone.is_set() or time.monotonic() - min(heard.values()) > LOST):
        pass
    if not done.is_set() and not done.wait(2 * BEAT):  # the error in the loop is the better one to end by
        print("error: another process of this run was lost; the same command continues it", file=sys.stderr, flush=True)
        os._exit(1)


def listen(rank: int, call: int, heard: dict[int, float], done: threading.Event, gone: threading.Event) -> None:
    """Beat, and keep in `heard` when each of the others has last done so. gone: the store cannot be reached any more"""
    beats = dict.fromkeys(heard, -1)
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=LOST))  # type: ignore[attr-defined]
        while not done.wait(BEAT):
            store.add(f"lora_booth/{call}/{rank}", 1)
            for other in heard:
                now = store.add(f"lora_booth/{call}/{other}", 0)
                if now != beats[other]:
                    beats[other], heard[other] = now, time.monotonic()
    except RuntimeError:
        gone.set()

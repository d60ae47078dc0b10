"""Several processes in one run, started by `accelerate launch` or `torchrun`: each takes its share of every batch."""

from __future__ import annotations

import atexit
import itertools
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

BEAT = 2.0  # seconds between two heartbeats of a process; this and the next two were chosen, not measured
LOST = 30.0  # seconds without a heartbeat after which a process counts as lost
LONGEST = timedelta(hours=2)  # how long a live process may keep the others waiting: class images on a slow machine
CALLS = itertools.count(1)  # a number for each training of this program, so that none reads another's heartbeats
WHEN_LOST = "another process of this run was lost; run the same command again to continue"


@dataclass(frozen=True)
class Processes:
    """The processes of a run. A single process neither sends nor waits."""

    index: int = 0  # of this one
    count: int = 1
    control: Any = None  # a gloo group, for small objects between the hosts
    gradients: Any = None  # the group of the gradients; None: the default one

    @property
    def main(self) -> bool:
        """This process writes files and displays progress."""
        return self.index == 0

    @property
    def share(self) -> slice:
        """This process's rows of a batch. There may be none: the losses of all shares are summed."""
        return slice(self.index, None, self.count)

    def sum_gradients(self, loss: Tensor, gradient: Tensor) -> Tensor:
        """Sum the gradient (n,) in place over all shares; returns the sum of their losses ()."""
        both = torch.cat([loss.reshape(1), gradient])
        with naming_a_lost_process():
            dist.all_reduce(both, group=self.gradients)
        gradient.copy_(both[1:])
        return both[0]

    def maximum(self, number: int) -> int:
        """The highest number that any process passes, so that all of them stop at the same step."""
        if self.count == 1:
            return number
        value = torch.tensor(number)
        with naming_a_lost_process():
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def wait_for_all(self) -> None:
        """No process leaves while another still needs it."""
        self.maximum(0)

    def from_main(self, work: Callable[[], T]) -> T:
        """The result of `work` in the main process, for all; an error there is raised everywhere."""
        if self.count == 1:
            return work()
        sent: list[Any] = [None]
        if self.main:
            try:
                sent = [(work(), None)]
            except BaseException as error:
                dist.broadcast_object_list([(None, f"the main process stopped: {error}")], group=self.control)
                raise
        with naming_a_lost_process():
            dist.broadcast_object_list(sent, group=self.control)
        result, stopped = sent[0]
        if stopped is not None:
            raise TrainingError(stopped)
        return result  # type: ignore[no-any-return]

    def check_same(self, value: str, what: str) -> None:
        """Raises TrainingError where `value` differs from that of the main process."""
        if self.from_main(lambda: value) != value:
            raise TrainingError(f"this process has other {what} than the main one; start them all with the same settings")

    def main_first(self, work: Callable[[], T]) -> T:
        """Run `work` in every process, the main one first: the others then find what it cached (class images)."""
        made: list[T] = []
        self.from_main(lambda: made.append(work()))
        return made[0] if made else work()


ALONE = Processes()


def started() -> bool:
    """Whether a launcher started several processes of this program."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """Whether this is the main process; usable before `joined`."""
    return not started() or os.environ["RANK"] == "0"


def own_gpu() -> None:
    """Call before loading a base: puts each process on a separate GPU while there are enough."""
    if started() and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that a launcher started with this one, or ALONE. device: of the base.

    Each process sends a heartbeat; one that misses another's for LOST seconds exits, since a sum of gradients would wait for
    hours. Its checkpoints are intact. (A process that dies closes its connections and is missed at once.)
    """
    several = dist.is_available() and (started() or dist.is_initialized())
    processes = joined_on(device) if several else ALONE
    if processes.count == 1 or "MASTER_ADDR" not in os.environ:
        yield processes
        return
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(processes.index, processes.count, next(CALLS), done), daemon=True)
    watcher.start()
    try:
        yield processes
    finally:
        done.set()
        watcher.join(BEAT)


@cache
def joined_on(device: torch.device) -> Processes:
    if not dist.is_initialized():  # accelerate may have done it
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST)
        atexit.register(dist.destroy_process_group)
    index, count = dist.get_rank(), dist.get_world_size()
    if count == 1:
        return ALONE
    control = dist.new_group(backend="gloo", timeout=LONGEST)
    places: list[Any] = [None] * count
    dist.all_gather_object(places, (socket.gethostname(), str(device)), group=control)
    shared = device.type == "cuda" and len(set(places)) < count  # nccl needs a GPU for each
    return Processes(index, count, control=control, gradients=control if shared or device.type != "cuda" else None)


@contextmanager
def naming_a_lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(WHEN_LOST) from error


def watch(index: int, count: int, call: int, done: threading.Event) -> None:
    """Exit when another process has been silent for LOST seconds. Listening runs in a separate thread: it blocks forever if
    the process that holds the store stops without closing its connections."""
    last_beats = {other: time.monotonic() for other in range(count) if other != index}
    gone = threading.Event()
    threading.Thread(target=listen, args=(index, call, last_beats, done, gone), daemon=True).start()
    while not (done.wait(BEAT) or gone.is_set() or time.monotonic() - min(last_beats.values()) > LOST):
        pass
    if not done.is_set() and not done.wait(2 * BEAT):  # the loop's own error is more helpful, if it comes
        print(f"error: {WHEN_LOST}", file=sys.stderr, flush=True)
        os._exit(1)


def listen(index: int, call: int, last_beats: dict[int, float], done: threading.Event, gone: threading.Event) -> None:
    """Send heartbeats, and note the time of each other process's last one. Sets `gone` when the store is unreachable."""
    beats = dict.fromkeys(last_beats, -1)
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=LOST))  # type: ignore[attr-defined]
        while not done.wait(BEAT):
            store.add(f"lora_booth/{call}/{index}", 1)
            for other in last_beats:
                now = store.add(f"lora_booth/{call}/{other}", 0)
                if now != beats[other]:
                    beats[other], last_beats[other] = now, time.monotonic()
    except RuntimeError:
        gone.set()

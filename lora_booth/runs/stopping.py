"""Stopping before the end: Ctrl-C and similar signals, and a time limit."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any, NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
TIME_UP = 1000  # above every signal's number
MARGIN = 2.0  # a time limit must leave room for so many of the longest update, with its checkpoint: chosen


class Stopping:
    """Asked after every update. Inside `with`, the first signal waits until then, and the second acts at once.

    time_limit  minutes from `began` (a time.monotonic())
    """

    def __init__(self, *, began: float, time_limit: float | None = None) -> None:
        self.ends = None if time_limit is None else began + 60 * time_limit
        self.signal = 0
        self.longest, self._last = 0.0, time.monotonic()
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        """The time until now was no update."""
        self._last = time.monotonic()

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # nohup stays nohup
                    self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            leave(number)
        self.signal = number

    def asked(self, *, copying: float = 0.0) -> int:
        """After an update: 0, TIME_UP or a signal's number. copying: seconds that the end also takes, for the mirror."""
        now = time.monotonic()
        self.longest, self._last = max(self.longest, now - self._last), now
        if self.signal:
            return self.signal
        return TIME_UP if self.ends is not None and now + MARGIN * (self.longest + copying) >= self.ends else 0


def leave(number: int) -> NoReturn:
    """End as Python does at Ctrl-C, or with the exit code of a process that a signal ended."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt("reported")  # the run has said what to do next
    raise SystemExit(128 + number)


def words_of(stop: int) -> str:
    if stop == TIME_UP:
        return "time is up"
    return "interrupted" if stop == signal.SIGINT else f"stopped by {signal.Signals(stop).name}"

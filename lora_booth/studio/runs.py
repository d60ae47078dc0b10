"""Trainings as processes of their own: the page starts and stops them, and reads the rest from their folders."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # comes with accelerate

from ..config import defaults
from ..errors import SettingsError, TrainingError, shown
from ..files import read_table, remove
from ..photos.finding import MANY
from ..report.reading import Run, read_run
from .folder import StudioFolder, check_name, write_facts

CHOICES = {  # in view on the page -> what it is for; `settings_of` says what it sets
    "quick": "a first look, in a quarter of the steps and without class images",
    "standard": "the defaults, which need no tuning",
    "careful": "half as many steps again, with eight rounds of samples, so that you can choose the best step",
}
TAIL = 4096  # bytes of a log whose last line is shown
COUNT = re.compile(r"(\d+)/(\d+)")  # in a line of progress
STARTING = "starting"  # where a log is still empty
ENDED = re.compile(r"running|stopped by an error|interrupted by (?!KeyboardInterrupt|SystemExit)\w+")  # but for its user
SAVING = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)  # what lets a training save and end


@dataclass(frozen=True)
class State:
    """What there is to say of a run. done: share of what its last line counts; run: None before its folder has a record"""

    alive: bool
    finished: bool
    failed: bool
    line: str
    done: float
    run: Run | None


def settings_of(choice: str, photos: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of TrainingConfig and LoraSpec for one of CHOICES; those that are given count more."""
    steps = given.get("steps") or defaults(photos, None)["steps"]
    chosen: dict[str, Any] = {}
    if choice == "quick":
        chosen = {"steps": max(1, steps // 4), "class_images": 0}
    elif choice == "careful":
        steps = steps if "steps" in given else steps * 3 // 2
        chosen = {"steps": steps, "sample_every": max(1, steps // 8)}
    return chosen | dict(given)


class Trainings:
    """The runs of a studio. Each is `lora-booth train --settings runs/NAME.json`, in a process of its own."""

    def __init__(self, folder: StudioFolder) -> None:
        self.folder = folder
        self._lock = threading.Lock()  # of two calls at once, one starts a training

    def names(self) -> list[str]:
        return self.folder.names("runs", ".json")

    def training(self) -> dict[str, psutil.Process]:
        """The runs that train, with their processes, whichever server started them: their commands name their settings."""
        processes = {word: process for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()}
        return {name: processes[self._option(name)] for name in self.names() if self._option(name) in processes}

    def start(self, name: str, subject: str, base: str, settings: Mapping[str, Any]) -> None:
        """A new run. Raises SettingsError for a name that is taken, TrainingError while another one trains."""
        place = self.folder.place
        with self._lock:
            if check_name(name) in self.names():
                raise SettingsError(f"there is a run {name!r}; go on with it, start it anew, or choose another name")
            if name in self.folder.names("adapters", ".safetensors"):
                raise SettingsError(
                    f"there is an adapter {name!r}, which a run of this name would replace; choose another name"
                )
            self._check_idle()
            files = {"folder": place("photos", subject), "out": self.folder.adapter_file(name), "run": place("runs", name)}
            options = {**self.folder.facts(subject), "base": base, "min_photos": 1, "max_photos": MANY, **settings}
            write_facts(place("runs", f"{name}.json"), {key: str(file) for key, file in files.items()} | options)
            self._launch(name)

    def again(self, name: str, *, restart: bool = False) -> None:
        """Go on with a run where it stopped, or start it anew."""
        if name not in self.names():
            raise SettingsError(f"{shown(name)}: no such run; choose one that the page lists")
        with self._lock:
            self._check_idle()
            if restart:  # by what the subject is called now
                file = self.folder.place("runs", f"{name}.json")
                settings = read_table(file)
                facts = self.folder.facts(Path(str(settings.get("folder"))).name)
                write_facts(file, settings | {key: text for key, text in facts.items() if text})
            self._launch(name, *["--restart"] * restart)

    def stop(self, name: str) -> None:
        """Let the run save a checkpoint and end."""
        process = self.training().get(name)
        if process is not None:
            os.kill(process.pid, SAVING)

    def remove(self, name: str) -> None:
        """Forget a run with all its files but the adapter's. Raises TrainingError while it trains."""
        if name in self.training():
            raise TrainingError(f"{name} is training; stop it first")
        for one in (name, f"{name}.log", f"{name}.json"):
            remove(self.folder.place("runs", one))

    def _check_idle(self) -> None:
        for name in self.training():
            raise TrainingError(f"{name} is training; wait until it ends, or stop it first")

    def _option(self, name: str) -> str:
        return f"--settings={self.folder.place('runs', f'{name}.json')}"

    def _launch(self, name: str, *more: str) -> None:
        words = [sys.executable, "-m", "lora_booth.cli", "train", self._option(name), *more]
        group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # on Windows what a session is elsewhere
        apart: dict[str, Any] = {"start_new_session": True, "creationflags": group, "stdin": subprocess.DEVNULL}
        with open(self.folder.place("runs", f"{name}.log"), "wb") as log:
            started = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, **apart)
        threading.Thread(target=started.wait, daemon=True).start()  # else it stays as a zombie

    def state(self, name: str) -> State:
        alive, line, run = name in self.training(), last_line(self.folder.place("runs", f"{name}.log")), None
        try:
            run = read_run(self.folder.place("runs", name))
        except SettingsError:
            pass
        begun = "" if line == STARTING else "running"  # where there is no record yet
        status = begun if run is None else str(run.record.get("status"))
        finished = not alive and status == "finished"
        failed = not alive and (line.startswith("error: ") or ENDED.fullmatch(status) is not None)
        counted = COUNT.search(line)
        step, total = (int(counted[1]), int(counted[2])) if counted else (0, 0)
        if not alive and not failed and run is not None:
            step, total = run.step, run.total
            line = f"stopped at step {step} of {total or '?'}; go on when you like"
            if finished:
                line = f"finished: {step} steps. Next: draw with it on the Play tab"
        elif failed and not line.startswith("error: "):
            line = f"ended early, perhaps stopped or out of memory; go on when you like. The log ends with: {line}"
        return State(alive, finished, failed, line, min(1.0, step / max(1, total)), run)


def last_line(log: Path) -> str:
    text = log.read_bytes()[-TAIL:].decode("utf-8", "replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return shown(lines[-1][:500]) if lines else STARTING

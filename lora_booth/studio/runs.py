"""Trainings as processes of their own: the page starts and stops them, and reads the rest from their folders."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import defaults
from ..errors import SettingsError, TrainingError, shown
from ..files import open_regular, remove, remove_folder
from .folder import StudioFolder, check_name

if TYPE_CHECKING:
    from ..report.reading import Run

CHOICES = {  # in view on the page -> what it is for; `settings_of` says what it sets
    "quick": "a first look, in a quarter of the steps and with nothing drawn first",
    "standard": "the defaults, which need no tuning",
    "careful": "half as many steps again, with eight rounds of samples, so that you can choose the best step",
}
TAIL = 4096  # bytes of a log whose last line is shown
COUNT = re.compile(r"(\d+)/(\d+)")  # in a line of progress
MAIN = "from lora_booth.cli import main; main()"
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
    """The runs of a studio. A run's process is in its runs/NAME.json, so that another server finds it again."""

    def __init__(self, folder: StudioFolder) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return self.folder.names("runs", ".json")

    def start(self, name: str, subject: str, base: str, settings: Mapping[str, Any]) -> None:
        """A new run. Raises SettingsError for a name that is taken, TrainingError while another one trains."""
        if check_name(name) in self.names():
            raise SettingsError(f"there is a run {name!r}; go on with it, start it anew, or choose another name")
        facts, place = self.folder.facts(subject), self.folder.place
        words = ["train", str(place("photos", subject))]
        options = {**facts, "out": self.folder.adapter_file(name), "run": place("runs", name), "base": base, "min_photos": 1}
        for key, value in {**options, **settings}.items():
            option = key.replace("_", "-")
            words.append(f"--{option}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{option}")
        self._launch(name, {"subject": subject, "words": words})

    def again(self, name: str, *, restart: bool = False) -> None:
        """Go on with a run where it stopped, or start it anew."""
        self._launch(name, self._note(name), *["--restart"] * restart)

    def stop(self, name: str) -> None:
        """Let the run save a checkpoint and end."""
        process = self.process(name)
        if process is not None:
            os.kill(process.pid, SAVING)

    def remove(self, name: str) -> None:
        """Forget a run with all its files but the adapter's. Raises TrainingError while it trains."""
        if self.process(name) is not None:
            raise TrainingError(f"{name} is training; stop it first")
        folder = self.folder.place("runs", name)
        if folder.exists():
            remove_folder(folder)
        for ending in (".json", ".log"):
            remove(self.folder.place("runs", f"{name}{ending}"))

    def _launch(self, name: str, note: dict[str, Any], *more: str) -> None:
        import psutil  # type: ignore[import-untyped]  # comes with accelerate

        with self._lock:
            busy = next((one for one in self.names() if self.process(one) is not None), None)
            if busy is not None:
                raise TrainingError(f"{busy} is training; wait until it ends, or stop it first")
            apart: dict[str, Any] = {"start_new_session": True}
            if os.name == "nt":
                apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined,unused-ignore]
            with open(self.folder.place("runs", f"{name}.log"), "wb") as log:
                words = [sys.executable, "-c", MAIN, *note["words"], *more]
                started = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **apart)
            threading.Thread(target=started.wait, daemon=True).start()  # else it stays as a zombie
            created = psutil.Process(started.pid).create_time()
            process = {"process": started.pid, "created": created}
            self.folder.write_settings(self.folder.place("runs", f"{name}.json"), note | process)

    def _note(self, name: str) -> dict[str, Any]:
        note = self.folder.settings("runs", f"{name}.json")
        words = note.get("words")
        if not (isinstance(words, list) and words[:1] == ["train"] and all(isinstance(word, str) for word in words)):
            raise SettingsError(f"{shown(name)}: no such run; choose one that the page lists")
        return note

    def process(self, name: str) -> Any | None:
        """The run's living process, whichever server started it."""
        import psutil

        note = self.folder.settings("runs", f"{name}.json")
        try:
            process = psutil.Process(note["process"])
            same = abs(process.create_time() - note["created"]) < 1  # and no later one with its number
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (KeyError, TypeError, ValueError, psutil.Error):
            return None

    def state(self, name: str) -> State:
        from ..report.reading import read_run

        self._note(name)
        alive, line, run = self.process(name) is not None, last_line(self.folder.place("runs", f"{name}.log")), None
        try:
            run = read_run(self.folder.place("runs", name))
        except SettingsError:
            pass
        finished, failed = not alive and run is not None and run.finished, not alive and line.startswith("error: ")
        counted = COUNT.search(line)
        step, total = (int(counted[1]), int(counted[2])) if counted else (0, 0)
        if not alive and not failed:
            step, total = (run.step, run.total) if run else (0, 0)
            line = f"finished: {step} steps" if finished else f"stopped at step {step} of {total or '?'}; go on when you like"
        return State(alive, finished, failed, line, min(1.0, step / max(1, total)), run)


def last_line(log: Path) -> str:
    try:
        with open_regular(log) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return shown(lines[-1][:500]) if lines else "starting"

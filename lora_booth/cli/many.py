"""The command that trains many subjects: a file with a job a line, and a folder of runs with a table of all jobs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import typer

from ..config import LoraSpec, TrainingConfig, typed
from ..errors import LoraBoothError, PhotoError, SettingsError, TrainingError, counted, reason_of, shown
from ..files import make_folder, number, parse_json, write_file
from .app import interruptible, note, say
from .arguments import check_folder, check_place, remember
from .options import Base, Crop, Loading, Settings, command, is_given

TABLE = "jobs.csv"
COLUMNS = "name,state,seconds,error"
NEEDED = {"folder", "token", "class_noun"}
EXAMPLE = '{"folder": "photos/rex", "token": "ohwx", "class_noun": "dog"}'


def jobs_in(file: Path) -> dict[str, tuple[str, Path, dict[str, Any]]]:
    """Name -> where it stands ("jobs.jsonl:3"), folder, token and class noun. Raises SettingsError, which names the line."""
    from ..runs.many import check_name
    from ..subject.subject import check_words

    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror}); pass a file with a job a line") from error
    found: dict[str, tuple[str, Path, dict[str, Any]]] = {}
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = parse_json(line)
            if not isinstance(job, dict) or not NEEDED <= job.keys() <= NEEDED | {"name"}:
                raise SettingsError(f"{shown(job):.60} is not a job; write {EXAMPLE}, and a name if you like")
            folder, words = typed("folder", job["folder"], Path), {key: job[key] for key in ("token", "class_noun")}
            if not folder.is_dir():
                raise SettingsError(f"{folder}: no such folder; pass a folder of photos")
            check_words(**words)
            check_name(name := job.get("name", folder.name), (*found, TABLE))
        except LoraBoothError as error:
            raise SettingsError(f"{file}:{at}: {error}") from error
        except ValueError as error:
            raise SettingsError(f"{file}:{at}: not JSON ({reason_of(error)}); write a job a line: {EXAMPLE}") from error
        found[name] = f"{file}:{at}", folder, words
    if not found:
        raise SettingsError(f"{file}: no jobs; write one a line: {EXAMPLE}")
    return found


class Table:
    """`jobs.csv` beside the runs: of every job its state, the seconds of all calls, and its error; written at every change.

    A state is waiting, training, finished or stopped, or an error.
    """

    def __init__(self, out: Path, names: Iterable[str]) -> None:
        self.file = out / TABLE
        self.states: dict[str, str | LoraBoothError] = dict.fromkeys(names, "waiting")
        check_place(self.file)
        if self.file.exists() and not self.file.read_bytes().startswith(COLUMNS.encode()):
            raise SettingsError(f"{self.file}: not a table of jobs; move it away, or pass another folder as --out")
        self.seconds = {name: self.took(name) for name in self.states}

    def took(self, name: str) -> float:
        from ..training.checkpoint import read_record

        parts = read_record(self.file.parent / name).get("seconds")
        return sum(number(part, 0) or 0 for part in parts.values()) if isinstance(parts, dict) else 0.0

    def change(self, name: str, state: str | LoraBoothError) -> None:
        self.states[name], self.seconds[name] = state, self.took(name)
        self.write()

    def write(self) -> None:
        text = io.StringIO(f"{COLUMNS}\n")
        text.seek(0, io.SEEK_END)
        table = csv.writer(text, lineterminator="\n")
        for name, state in self.states.items():
            words = ("failed", state) if isinstance(state, LoraBoothError) else (state, "")
            table.writerow((name, words[0], round(self.seconds[name]), words[1]))
        with suppress(OSError):  # e.g. open in a spreadsheet on Windows; the next change writes it
            write_file(self.file, text.getvalue().encode())


@command
def train_many(
    jobs: Path,  # file with a job a line: {"folder": "photos/rex", "token": "ohwx", "class_noun": "dog"}, e.g. jobs.jsonl
    *,
    out: Path,  # folder for the runs, each in a folder of its name, and for jobs.csv, a table of all jobs, e.g. runs
    base: Base = "toybox",
    loading: Loading,
    lora: LoraSpec,
    config: TrainingConfig,
    ray: str | None = None,  # address of a Ray cluster whose nodes train, e.g. auto, or local for one here [this process]
    together: int | None = None,  # subjects that share a forward pass, e.g. 8 [on a CPU up to 8, on a GPU one]
    mirror: str | None = None,  # folder for copies of the checkpoints, or its URL, e.g. /mnt/drive/runs or s3://bucket/runs
    init: Path | None = None,  # adapter file to begin each with, e.g. first.safetensors [a new adapter]
    template: list[str] | None = None,  # prompts of the photos, in turn, e.g. 'a photo of a {token} {class_noun}'; repeatable
    crop: Crop = "smart",
    min_photos: int = 3,  # fewest photos to accept, e.g. 1
    max_photos: int = 100,  # most photos to accept, e.g. 200
    time_limit: float | None = None,  # minutes, e.g. 25, after which all that are in training are saved
    restart: bool = False,  # discard earlier runs in the same folders
    settings: Settings = None,
    context: typer.Context,
) -> None:
    """Train an adapter for each of many subjects. Run the same command again to continue."""
    from ..runs.many import train_many as train_subjects
    from ..runs.ray_workers import connected
    from ..subject.subject import INSTANCE_TEMPLATE, Subject

    check_folder(out)
    listed = jobs_in(jobs)
    subjects: dict[str, Subject] = {}
    make_folder(out.absolute())
    table = Table(out, listed)
    reading: dict[str, Any] = {"crop": crop, "minimum": min_photos, "maximum": max_photos}
    reading["templates"] = template or (INSTANCE_TEMPLATE,)
    for name, (place, folder, words) in listed.items():
        try:
            subjects[name] = Subject.from_folder(folder, **words, **reading)
        except PhotoError as error:  # the others need not wait
            note(f"{place}: {error}")
            table.states[name] = error
    table.write()
    if subjects:
        given = lora if init is None or is_given(context, LoraSpec) else None  # None: as that adapter has it
        how: dict[str, Any] = {"lora": given, "config": config, "init": init, "together": together}
        how |= {"out": out, "mirror": mirror, "time_limit": time_limit, "restart": restart, "on_change": table.change}
        loaded: Any = partial(loading.base, base)
        if ray is None:
            remember(loaded := loaded(), base)
        else:
            connected(ray)
            how["engine"] = "ray"
        try:
            with interruptible():
                train_subjects(loaded, subjects, **how)
        finally:
            for name in [name for name, state in table.states.items() if state == "training"]:
                table.change(name, "stopped")
    failed = [f"{name}: {state}" for name, state in table.states.items() if isinstance(state, LoraBoothError)]
    finished = sum(state == "finished" for state in table.states.values())
    say(f"{finished} of {counted(len(listed), 'adapter')} in {out}, one in each folder; {table.file} lists all jobs")
    if failed:
        count = counted(len(listed), "job")
        raise TrainingError(f"{len(failed)} of {count} failed; {table.file} says why, first {failed[0]}")

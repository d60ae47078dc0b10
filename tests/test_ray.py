"""train_many() on a Ray cluster of two nodes in this machine: what dies is tried again."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipelines
import pytest

import lora_booth.errors
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import AdapterError, LoraBoothError, MissingExtraError, PhotoError, SettingsError
from lora_booth.files import is_running
from lora_booth.runs.many import train_many
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training.checkpoint import ADAPTER, read_record
from lora_booth.training.lock import LOCK

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(steps=60, checkpoint_every=5, class_images=0, sample_every=0, learning_rate=1e-3)


NODE = {"num_cpus": 1, "object_store_memory": 10**8}


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    """A cluster."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_worker_niceness", "0")
        # brought by the extra `dev`, and not by `test`: 240 MB, and a minute or two of processes that start and are killed
        ray = pytest.importorskip("ray", reason="needs lora-booth[ray], which the extra `dev` brings")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        ray.init(cluster.address, log_to_driver=False, logging_level="warning")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def cluster(started: Any) -> Any:
    """Two nodes of one core each, also after a test that removed one."""
    if not started.worker_nodes:
        started.add_node(**NODE)
    return started


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save("sd1", tmp_path_factory.mktemp("bases") / "tiny")


def when(there: Callable[[], Any], act: Callable[[], Any]) -> threading.Thread:
    """Act in another thread, once it is there."""

    def watch() -> None:
        wait_for(there)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def wait_for(there: Callable[[], Any]) -> Any:
    ends = time.monotonic() + 240
    while not (found := there()):
        assert time.monotonic() < ends
        time.sleep(0.02)
    return found


def trainer_of(run: Path) -> list[int]:
    """The process that trains it, and the one that started it: the raylet of its node."""
    try:
        process = int(re.findall(r"\d+", (run / f"{LOCK}.txt").read_text())[0])
        return [process, int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])]
    except (OSError, IndexError):
        return []


def continued(run: Path) -> bool:
    return any(event["what"].startswith("continued at step") for event in read_record(run)["events"])


def saved(run: Path) -> bool:
    return any((run / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_worker_and_a_node_die_and_the_adapters_are_those_of_undisturbed_runs(
    cluster: Any, tiny: Path, photos: Path, tmp_path: Path
) -> None:
    out, subjects = tmp_path / "runs", {}
    for name in ("a", "b", "broken", "taken"):
        shutil.copytree(photos, tmp_path / name)
        subjects[name] = Subject.from_folder(tmp_path / name, token="sks", class_noun="dog")
    (tmp_path / "broken" / "0.jpg").write_bytes(b"no picture")
    expected = train(tiny, subjects["a"], lora=LORA, config=CONFIG, out=tmp_path / "alone", progress=False)
    other = {"steps": 1, "prior_loss_weight": 0.0}
    train(tiny, subjects["a"], lora=LORA, config=replace(CONFIG, **other), out=out / "taken", progress=False)
    hit: dict[str, Path] = {}

    def on(node: Any) -> bool:
        """Whether it trains a subject that has a checkpoint."""
        raylet = node.all_processes["raylet"][0].process.pid
        runs = [out / name for name in "ab" if saved(out / name) and raylet in trainer_of(out / name)]
        hit.update((node.unique_id, run) for run in runs)
        return bool(runs)

    first, second = cluster.head_node, next(iter(cluster.worker_nodes))
    threads = [
        when(lambda: on(first), lambda: os.kill(trainer_of(hit[first.unique_id])[0], signal.SIGKILL)),
        when(lambda: on(second), lambda: cluster.remove_node(second, allow_graceful=False)),
    ]
    seen: list[tuple[str, Any]] = []
    how: dict[str, Any] = {"lora": LORA, "config": CONFIG, "out": out, "restart": True, "engine": "ray"}
    adapters, errors = train_many(str(tiny), subjects, **how, on_change=lambda *news: seen.append(news))
    for thread in threads:
        thread.join()
    assert set(hit) == {first.unique_id, second.unique_id} and all(map(continued, hit.values()))
    assert list(errors) == ["broken"] and isinstance(errors["broken"], PhotoError) and "0.jpg" in str(errors["broken"])
    for name in ("a", "b", "taken"):
        assert (out / name / ADAPTER).read_bytes() == (tmp_path / "alone" / ADAPTER).read_bytes()
        assert adapters[name].card == expected.card
    assert [state for _, state in seen].count("training") == len(subjects) + 2


MANY = replace(CONFIG, steps=15, checkpoint_every=3)


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (run / "checkpoints").glob("[0-9]*"))


def continued_at(run: Path) -> list[int]:
    return [event["step"] for event in read_record(run)["events"] if event["what"].startswith("continued at step")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_node_and_then_the_command_die_and_the_same_command_trains_what_is_left(
    cluster: Any, tiny: Path, photos: Path, tmp_path: Path
) -> None:
    """40 subjects, of which 3 cannot be trained. Nothing is lost, and nothing trained twice but what no checkpoint had."""
    out, sets = tmp_path / "runs", [tmp_path / "three", tmp_path / "two"]
    for folder in sets:
        shutil.copytree(photos, folder)
    (sets[1] / "0.jpg").unlink()
    broken = {"empty": "no usable photo", "text": "no usable photo", "taken": "holds a run with other photos, settings or base"}
    (tmp_path / "empty").mkdir()
    shutil.copytree(photos, tmp_path / "text")
    for photo in (tmp_path / "text").iterdir():
        photo.write_text("no picture")
    good = {f"subject {n:02}": sets[n % 2] for n in range(37)}
    folders = {**good, "empty": tmp_path / "empty", "text": tmp_path / "text", "taken": sets[0]}
    names = [*list(good)[:5], *broken, *list(good)[5:]]
    jobs = tmp_path / "jobs.jsonl"
    lines = ({"name": name, "folder": str(folders[name]), "token": "sks", "class_noun": "dog"} for name in names)
    jobs.write_text("\n".join(map(json.dumps, lines)))
    expected = {}
    for folder in sets:
        subject = Subject.from_folder(folder, token="sks", class_noun="dog", minimum=1)
        train(tiny, subject, lora=LORA, config=MANY, out=(run := tmp_path / f"{folder.name} alone"), progress=False)
        expected[folder] = (run / ADAPTER).read_bytes()
    train(tiny, subject, lora=LORA, config=replace(MANY, steps=1), out=out / "taken", progress=False)

    def in_training(node: Any) -> Path | None:
        """A run on this node that has a checkpoint, and is not near its end."""
        raylet = node.all_processes["raylet"][0].process.pid
        runs = [run for name in good if (run := out / name).exists() and raylet in trainer_of(run)]
        return next((run for run in runs if 0 < max(checkpoints_of(run), default=0) < MANY.steps // 2), None)

    settings = ("--rank", 2, "--steps", 15, "--checkpoint-every", 3, "--class-images", 0, "--sample-every", 0)
    words = ["train-many", jobs, "--base", tiny, "--out", out, "--ray", cluster.address, "--min-photos", 1]
    words += [*settings, "--learning-rate", 1e-3]

    def started_command() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "lora_booth.cli", *map(str, words)], stderr=subprocess.PIPE, text=True)

    node = next(iter(cluster.worker_nodes))
    with started_command() as command:
        lost = wait_for(lambda: in_training(node))
        had = {lost: checkpoints_of(lost)[-1]}
        cluster.remove_node(node, allow_graceful=False)
        run = wait_for(lambda: (lost / ADAPTER).exists() and in_training(cluster.head_node))
        process, _ = trainer_of(run)
        command.kill()
    cluster.add_node(**NODE)
    wait_for(lambda: not is_running(process))
    had[run] = checkpoints_of(run)[-1]  # its worker ended with the command
    finished = {name: (out / name / ADAPTER).stat().st_mtime_ns for name in good if (out / name / ADAPTER).exists()}
    assert len(finished) < 30 and 0 < had[run] < MANY.steps
    with started_command() as command:
        _, said = command.communicate()
    assert command.returncode == 2 and f"error: 3 of 40 jobs failed; {out / 'jobs.csv'} says why" in said, said

    with (out / "jobs.csv").open() as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert list(table) == names
    assert {name for name, row in table.items() if row["state"] != "finished"} == set(broken)
    assert all(table[name]["state"] == "failed" and error in table[name]["error"] for name, error in broken.items())
    for name, folder in good.items():
        assert (out / name / ADAPTER).read_bytes() == expected[folder], name
        assert finished.get(name) in (None, (out / name / ADAPTER).stat().st_mtime_ns)
        assert len(continued_at(out / name)) == (out / name in had)
    assert continued_at(run) == [had[run]] and continued_at(lost)[0] >= had[lost]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc gives each process a folder of its own under one name")
def test_nodes_that_share_a_mirror_only(
    cluster: Any, tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed, and another one, which has another run folder, goes on from the mirror."""
    rex = Subject.from_folder(photos, token="sks", class_noun="dog")
    expected = train(tiny, rex, lora=LORA, config=CONFIG, out=tmp_path / "alone", progress=False)
    (tmp_path / "driver").mkdir()
    monkeypatch.chdir(tmp_path / "driver")
    out, mirror = Path("/proc/self/cwd/runs"), tmp_path / "mirror"

    def load() -> Any:
        """In a worker: as if its process were a node."""
        import os

        from lora_booth import BaseModel

        os.makedirs(folder := tmp_path / f"node {os.getpid()}")
        os.chdir(folder)
        return BaseModel.load(tiny)

    def copied() -> Path | None:
        """A run of which the mirror has a checkpoint, and which is not near its end."""
        steps = {run: checkpoints_of(mirror / run.name) for run in tmp_path.glob("node */runs/?") if trainer_of(run)}
        return next((run for run, copies in steps.items() if 0 < max(copies, default=0) < CONFIG.steps // 2), None)

    killed: list[tuple[Path, int]] = []

    def kill() -> None:
        run = wait_for(copied)
        killed.append((run, checkpoints_of(mirror / run.name)[-1]))
        os.kill(trainer_of(run)[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    how: dict[str, Any] = {"lora": LORA, "config": CONFIG, "out": out, "mirror": mirror.as_uri(), "engine": "ray"}
    adapters, errors = train_many(load, {"a": rex, "b": rex}, **how)
    thread.join()
    [(lost, copied_at)] = killed
    assert not errors and len(list(tmp_path.glob(f"node */runs/{lost.name}"))) == 2 and not (lost / ADAPTER).exists()
    [at] = continued_at(out / lost.name)
    assert copied_at <= at < CONFIG.steps
    for name in "ab":
        assert (out / name / ADAPTER).read_bytes() == (tmp_path / "alone" / ADAPTER).read_bytes()
        assert adapters[name].card == expected.card and read_record(out / name)["status"] == "finished"


def test_it_needs_its_package(rex: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'engine="ray" needs an optional package; pip install \'lora-booth\[ray\]\''):
        train_many("toybox", {"rex": rex}, out=tmp_path, engine="ray")


def test_arguments_that_do_not_go_with_it(rex: Subject, tmp_path: Path) -> None:
    for base, options, told in (
        ("toybox", {"out": None}, "needs a folder for the runs; pass out="),
        ("toybox", {"together": 2}, "together=2 is not possible"),
        (pipelines.base_of("sd1"), {}, "base is loaded"),
    ):
        with pytest.raises(SettingsError, match=told):
            train_many(base, {"rex": rex}, **{"out": tmp_path, "engine": "ray", **options})


def test_errors_survive_the_way_between_processes() -> None:
    errors = [one for one in vars(lora_booth.errors).values() if isinstance(one, type) and issubclass(one, LoraBoothError)]
    made = [one("what", "more") if issubclass(one, AdapterError | MissingExtraError) else one("what") for one in errors]
    for error in made:
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)

"""train_many() on a Ray cluster of two nodes in this machine: what dies is tried again."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
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
from lora_booth.runs.many import train_many
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training.checkpoint import ADAPTER, read_record
from lora_booth.training.lock import LOCK

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(steps=60, checkpoint_every=5, class_images=0, sample_every=0, learning_rate=1e-3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_worker_niceness", "0")
        # brought by the extra `dev`, and not by `test`: 240 MB, and a minute or two of processes that start and are killed
        ray = pytest.importorskip("ray", reason="needs lora-booth[ray], which the extra `dev` brings")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
        cluster.add_node(num_cpus=1, object_store_memory=10**8)
        ray.init(cluster.address, log_to_driver=False, logging_level="warning")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


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


def wait_for(there: Callable[[], Any]) -> None:
    ends = time.monotonic() + 240
    while not there():
        assert time.monotonic() < ends
        time.sleep(0.02)


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

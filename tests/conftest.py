"""What every test shares: no network, one thread, no trace outside a temporary folder, and what is slow to build."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HOME = Path(tempfile.mkdtemp(prefix="lora_booth_tests_"))
os.environ["HF_HOME"] = str(HOME / "huggingface")  # huggingface_hub reads these once, when it is imported
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # all processes of a run share one cache
    os.environ["LORA_BOOTH_CACHE"] = str(HOME / "lora_booth")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # where there is no GPU, Triton's kernels run in its interpreter

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

MOST_PROCESSES = 4  # chosen: each takes 1.5 GB


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process for each CPU; none besides this one when files are named, so that a few tests answer at once."""
    if any(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return 0
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cpus == 1 else min(cpus, MOST_PROCESSES)


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch  # takes seconds, and with several processes the first one needs none

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three photos of one coloured blob before different backgrounds; no two alike."""
    folder = tmp_path_factory.mktemp("photos") / "rex"
    folder.mkdir()
    rng = np.random.default_rng(0)
    down, right = np.mgrid[0:300, 0:260]
    for i in range(3):
        picture = np.empty((300, 260, 3))
        picture[...] = rng.integers(40, 215, 3)
        picture += 25 * np.sin(down / (11 + 7 * i) + right / 23)[..., None]
        blob = (down - 110 - 40 * i) ** 2 + (right - 90 - 30 * i) ** 2 < 70**2
        picture[blob] = (210, 120, 40)
        picture += rng.normal(0, 12, picture.shape)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=92)
    return folder


@pytest.fixture(scope="session")
def rex(photos: Path) -> Any:
    """The subject of these photos."""
    from lora_booth.subject.subject import Subject

    return Subject.from_folder(photos, token="sks", class_noun="dog")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """kind -> a saved diffusers folder of the tiny pipeline"""
    from pipelines import KINDS, save  # takes seconds, and not every test needs it

    return {kind: save(kind, tmp_path_factory.mktemp("bases") / f"tiny-{kind}") for kind in KINDS}


@pytest.fixture
def hub() -> Iterator[Callable[[str, Path], str]]:
    """Put a folder into the local cache of the Hub under a name, as a download would."""
    from huggingface_hub import constants

    caches = []

    def put(name: str, folder: Path) -> str:
        cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        caches.append(cache)
        commit = "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(folder, cache / "snapshots" / commit)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commit)
        return name

    yield put
    for cache in caches:
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process -> exit code, stdout, stderr."""
    from lora_booth import cli

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in words])
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    return run

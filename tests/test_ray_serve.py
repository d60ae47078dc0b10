"""The server on a Ray cluster: two replicas, OpenAI's own client, and a replica that dies."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
from PIL import Image

# brought by the extra `dev`, and not by `test`, as in test_ray.py
ray = pytest.importorskip("ray", reason="needs lora-booth[ray]")
serve = pytest.importorskip("ray.serve", reason="needs lora-booth[ray]")
openai = pytest.importorskip("openai")

from lora_booth.adapters.adapter import Adapter  # noqa: E402
from lora_booth.base.base_model import BaseModel  # noqa: E402
from lora_booth.config import LoraSpec  # noqa: E402
from lora_booth.errors import SettingsError  # noqa: E402
from lora_booth.pictures.composition import Composition  # noqa: E402
from lora_booth.serve.on_ray import application  # noqa: E402

TOKEN = "a-token-of-the-tests"
PORT = 18765
NAMES = ("rex", "bob")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and a folder of adapters"""
    folder = tmp_path_factory.mktemp("served")
    pipelines.save("sd1", folder / "tiny")
    for seed, name in enumerate(NAMES):
        adapter = pipelines.random_adapter(BaseModel.load(folder / "tiny"), LoraSpec(rank=2), seed=seed)
        (folder / "adapters").mkdir(exist_ok=True)
        adapter.save(folder / "adapters" / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def address(made: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")  # on a busy machine
        environment.setenv("RAY_worker_niceness", "0")
        ray.init(num_cpus=4, object_store_memory=10**8, log_to_driver=False, logging_level="warning")
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        options = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}}
        serve.run(application(made / "tiny", made / "adapters", token=TOKEN, **options), name="pictures")
        yield f"http://127.0.0.1:{PORT}"
        serve.shutdown()
        ray.shutdown()


def draw(address: str, model: str, seed: int) -> np.ndarray:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=3, timeout=300) as client:
        header = {"serve_multiplexed_model_id": model}
        more: dict[str, Any] = {"extra_body": {"seed": seed, "steps": 2}, "extra_headers": header}
        [one] = client.images.generate(model=model, prompt="sks dog", **more).data
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json))), np.int16)


def alone(made: Path, name: str, seed: int) -> np.ndarray:
    adapter = Adapter.load(made / "adapters" / f"{name}.safetensors")
    [picture] = Composition(BaseModel.load(made / "tiny"), [adapter]).generate("sks dog", seeds=[seed], steps=2)
    return np.asarray(picture.image, np.int16)


@pytest.mark.slow
def test_pictures_are_those_that_the_adapters_draw_alone(address: str, made: Path) -> None:
    for seed in range(3):
        for name in NAMES:
            assert np.abs(draw(address, name, seed) - alone(made, name, seed)).max() <= 2
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
        draw(address, "nobody", 0)
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{address}/v1", api_key="no") as stranger:
        stranger.models.list()


@pytest.mark.slow
def test_a_replica_that_dies_is_replaced(address: str, made: Path) -> None:
    actors = [one for one in ray.util.list_named_actors(all_namespaces=True) if "Pictures" in one["name"]]
    assert len(actors) == 2
    ray.kill(ray.get_actor(**actors[0]))
    ends = time.monotonic() + 240
    while True:
        try:
            picture = draw(address, "rex", 5)
            break
        except openai.APIError:
            assert time.monotonic() < ends
    assert np.abs(picture - alone(made, "rex", 5)).max() <= 2


def test_a_short_token_is_refused() -> None:
    with pytest.raises(SettingsError, match="token is out of range; allowed: 16 or more"):
        application("toybox", "adapters", token="short")

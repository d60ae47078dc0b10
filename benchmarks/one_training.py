"""One training in a process of its own, lora_booth's or diffusers' script's, with a clock at every optimizer update.

Called by train_step.py with a JSON job; writes what it measured as JSON. The script runs unmodified through runpy.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")) if len(sys.argv) > 1 else {}
STARTED = float(os.environ.get("BENCHMARK_STARTED", time.time()))


class Clock:
    """When each update was done, and the most memory of the process before, during and after the loop."""

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, []
        self.cpu: list[float] = []  # seconds that this process has computed: less noisy than the clock where others work too
        self.peaks: dict[str, float | None] = {}

    def tick(self, *_: Any) -> None:
        import torch

        done = len(self.times) + 1
        if torch.cuda.is_available() and done in (1, self.warm, self.steps):  # else the loop is not held up
            torch.cuda.synchronize()
        self.times.append(time.time())
        self.cpu.append(time.process_time())
        if done == 1:
            self.peaks["before"] = peak(reset=True)
        if done == self.steps:
            self.peaks["training"] = peak(reset=True)

    @property
    def warm(self) -> int:
        """The first updates (compiling, capturing) are not counted."""
        return max(1, min(10, self.steps // 4))

    def report(self) -> dict[str, Any]:
        import torch

        self.peaks["after"] = peak(reset=False)
        known = [value for value in self.peaks.values() if value is not None]
        intervals, cpu = ([b - a for a, b in zip(t, t[1:], strict=False)] for t in (self.times, self.cpu))
        counted = self.times[self.warm - 1 :]
        cuda = torch.cuda.is_available()
        return {
            "steps": len(self.times),
            "to_first_step": self.times[0] - STARTED,
            "intervals": intervals,
            "cpu_intervals": cpu,
            "cpu_to_first_step": self.cpu[0],
            "cpu_whole_run": time.process_time(),
            "mean": (counted[-1] - counted[0]) / max(1, len(counted) - 1),
            "peaks_gib": self.peaks,
            "peak_gib": max(known) if known else None,
            "cuda_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            "cuda_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "threads": torch.get_num_threads(),
        }


def peak(*, reset: bool) -> float | None:
    """The most memory of this process since the last reset, in GiB (Linux)."""
    try:
        text = Path("/proc/self/status").read_text()
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return int(text.split("VmHWM:")[1].split()[0]) / 2**20


def run_lora_booth() -> dict[str, Any]:
    import torch

    import lora_booth as lb

    clock = Clock(JOB["steps"])
    base = lb.BaseModel.load(JOB["base"], dtype=getattr(torch, JOB["dtype"]), quantize=JOB["config"].pop("quantize", None))
    words = {"token": "sks", "class_noun": "dog"}
    subject = lb.Subject.from_folder(JOB["photos"], **words, minimum=1, class_images=JOB.get("own"))
    config = lb.TrainingConfig(**JOB["config"])
    adapter = lb.train(base, subject, lora=lb.LoraSpec(rank=JOB["rank"]), config=config, on_step=clock.tick)
    adapter.save(Path(JOB["out"]) / "adapter.safetensors")
    return clock.report()


def run_script() -> dict[str, Any]:
    from importlib.util import find_spec

    from torch.optim.optimizer import register_optimizer_step_post_hook

    stand_in = find_spec("torchvision") is None
    if stand_in:
        from torchvision_stand_in import put_in_place

        put_in_place()
    clock = Clock(JOB["steps"])
    register_optimizer_step_post_hook(clock.tick)
    sys.argv = [JOB["script"], *JOB["arguments"]]
    runpy.run_path(JOB["script"], run_name="__main__")
    return clock.report() | {"torchvision": "stand-in" if stand_in else "the real one"}


# --- what both need -------------------------------------------------------------------------------------------------


def build() -> dict[str, Any]:
    """A diffusers folder of a family's real shape with random weights, and photos."""
    if not (Path(JOB["base"]) / "model_index.json").is_file():
        random_base(JOB["family"], Path(JOB["base"]))
    if JOB["photos"] and not Path(JOB["photos"]).is_dir():
        random_photos(Path(JOB["photos"]))
    return {}


def random_base(family: str, folder: Path) -> None:
    """Configurations are those that the library has for single files; one component in memory at a time.

    The weights are fp32, or fp16 where there is a GPU to make them: most files that people load are. family: "tiny-sd1" as well
    """
    import shutil

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from plan import tiny
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from lora_booth.base.families import FAMILIES
    from lora_booth.base.single_file import CONFIGS

    narrow, family = family.startswith("tiny-"), family.removeprefix("tiny-")
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if family == "toybox":
        from lora_booth.base.base_model import TOYBOX_FOLDER

        shutil.copytree(TOYBOX_FOLDER, unfinished, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    else:
        shutil.copytree(CONFIGS / family, unfinished, dirs_exist_ok=True)
    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    torch.manual_seed(0)
    found = [name for name in classes if (unfinished / name).is_dir()]
    parts = {name: json.loads((unfinished / name / "config.json").read_text()) for name in found}
    for name, config in parts.items():
        cls, config = classes[name], tiny(name, parts) if narrow else config
        with torch.device(device):
            model = cls(CLIPTextConfig(**config)) if name.startswith("text") else cls.from_config(config)
        model.to(dtype).save_pretrained(unfinished / name, safe_serialization=True)
        del model
    for name in () if family == "toybox" else FAMILIES[family].tokenizers:
        words().save_pretrained(unfinished / name)
    unfinished.rename(folder)


def words() -> Any:
    """A tokenizer of CLIP's size that knows letters: the real vocabulary is not in the package."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789!,.'-"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary += [f"filler{i}</w>" for i in range(49406 - len(vocabulary))]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=[], model_max_length=77)


def random_photos(folder: Path) -> None:
    """Five photos of the size of a small camera's."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(5):
        coarse = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        coarse.resize((1600, 1200), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=92)


def class_pictures() -> dict[str, Any]:
    """The same class images for both, so that nobody draws any."""
    import numpy as np
    from PIL import Image

    folder = Path(JOB["class_images"])
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for i in range(JOB["count"]):
        coarse = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        coarse.resize((JOB["resolution"],) * 2, Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return {}


if __name__ == "__main__":
    result = {"lora_booth": run_lora_booth, "script": run_script, "build": build, "class_pictures": class_pictures}[
        JOB["what"]
    ]()
    Path(JOB["result"]).write_text(json.dumps(result), encoding="utf-8")

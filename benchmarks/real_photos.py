"""The whole path on real photos: audit, crops, cached latents, training, file, stock loader, pictures.

    python benchmarks/real_photos.py --photos FOLDER_OF_FOLDERS --out OUT

Every folder is one subject. Each is trained on a small pipeline of every family (random weights: this checks the path,
not the likeness) and on the toybox.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

import lora_booth as lb
from lora_booth.photos.cropping import crop_and_resize
from lora_booth.photos.opening import open_photo
from lora_booth.photos.sheet import contact_sheet

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from pipelines import make_pipeline, same_state, state  # noqa: E402


def run(base: lb.BaseModel, subject: lb.Subject, file: Path, steps: int) -> tuple[float, float, list[lb.Picture]]:
    """Train, save, and draw with both loaders: seconds, largest pixel difference (0..1), pictures."""
    before = state(base.pipeline)
    started = time.perf_counter()
    adapter = lb.train(base, subject, config=lb.TrainingConfig(steps=steps, class_images=4), progress=False)
    seconds = time.perf_counter() - started
    if not same_state(before, state(base.pipeline)):
        raise RuntimeError("the base changed")
    adapter.save(file, dtype="fp32")
    pictures = lb.Composition(base, [(lb.Adapter.load(file), 1.0)]).generate(subject.instance_prompt, seeds=[0, 1], steps=10)
    base.pipeline.load_lora_weights(str(file))
    stock = lb.Composition(base).generate(subject.instance_prompt, seeds=[0, 1], steps=10)
    base.pipeline.unload_lora_weights()
    pairs = zip(pictures, stock, strict=True)
    difference = max(np.abs(np.asarray(a.image, float) - np.asarray(b.image, float)).max() / 255 for a, b in pairs)
    return seconds, difference, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    bases = {
        kind: lb.BaseModel.from_pipeline(make_pipeline(kind), name=f"tiny-{kind}") for kind in ("sd1", "sd2", "sd2-v", "sdxl")
    }
    bases["toybox"] = lb.BaseModel.load("toybox")
    sheet, labels = [], []
    for folder in sorted(f for f in arguments.photos.iterdir() if f.is_dir()):
        noun = folder.name.split("_")[-1].rstrip("0123456789")
        subject = lb.Subject.from_folder(folder, token="sks", class_noun=noun)
        crops = [crop_and_resize(open_photo(p), (512, 512), p.crop) for p in subject.photos]
        contact_sheet(crops, labels=[p.name for p in subject.photos]).save(arguments.out / f"{folder.name}_crops.png")
        print(f"{folder.name}: {len(subject.photos)} photos used, {len(subject.skipped)} skipped")
        for name, base in bases.items():
            file = arguments.out / f"{folder.name}_{name}.safetensors"
            seconds, difference, pictures = run(base, subject, file, arguments.steps)
            size = file.stat().st_size / 1e6
            print(
                f"  {name:7} {seconds:5.1f} s, file {size:.2f} MB, ours against the stock loader {difference:.1e}", flush=True
            )
            sheet += [p.image for p in pictures]
            labels += [f"{folder.name} on {name}"] * len(pictures)
    contact_sheet(sheet, labels=labels, columns=2 * len(bases), side=96).save(arguments.out / "pictures.png")


if __name__ == "__main__":
    main()

"""How many of the package's files each part of the job runs through: `python tools/files_run.py [--list]`.

A file counts when a function or method of it runs during the call; being imported is not enough. On the embedded base, with
photos that its world draws and everything in the cache: a training before has encoded them.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import lora_booth as lb
from lora_booth.toybox.scenery import CONTEXTS
from lora_booth.toybox.world import HELD_OUT, photos_of

PACKAGE = Path(lb.__file__).parent


def files_run(job: Callable[[], object]) -> dict[str, set[str]]:
    """File below the package -> names of its functions that `job` ran. Bodies of modules and classes do not count."""
    seen: dict[str, set[str]] = {}

    def on_call(frame: object, event: str, _: object) -> None:
        code = frame.f_code  # type: ignore[attr-defined]
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<module"):
            if code.co_flags & 0x2:  # CO_NEWLOCALS: a function, not the body of a class
                seen.setdefault(str(Path(code.co_filename).relative_to(PACKAGE)), set()).add(code.co_name)

    threading.setprofile(on_call)
    sys.setprofile(on_call)
    try:
        job()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return seen


def lines_of(names: set[str]) -> int:
    return sum(len((PACKAGE / name).read_text().splitlines()) for name in names)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        photos = folder / "photos"
        photos.mkdir()
        for number, image in enumerate(photos_of(next(iter(HELD_OUT.values())), 4, CONTEXTS)):
            image.save(photos / f"{number}.png")
        base = lb.BaseModel.load("toybox")
        subject = lb.Subject.from_folder(photos, token="zwx", class_noun="dog")
        config = lb.TrainingConfig(steps=3, class_images=2)
        lora = lb.LoraSpec(rank=2)

        prepare, training_steps = lb.prepare, lb.training_steps  # the package looks a name up at its first use

        def loop() -> None:
            cache = prepare(base, subject, lora=lora, config=config)
            for _ in training_steps(base, cache, lora=lora, config=config):
                pass

        adapter = lb.train(base, subject, lora=lora, config=config)
        studio = lb.Composition(base, [(adapter, 1.0)])
        jobs: dict[str, Callable[[], object]] = {
            "prepare + training_steps": loop,
            "train, no folder": lambda: lb.train(base, subject, lora=lora, config=config),
            "train, with a folder": lambda: lb.train(base, subject, lora=lora, config=config, out=folder / "run"),
            "Composition.generate, one adapter": lambda: studio.generate("a photo of zwx dog at sea", seeds=[0], steps=2),
        }
        for name, job in jobs.items():
            ran = files_run(job)
            print(f"{name}: {len(ran)} files ({lines_of(set(ran))} lines in them)")
            if "--list" in sys.argv:
                for file, functions in sorted(ran.items()):
                    print(f"    {file}: {', '.join(sorted(functions))}")


if __name__ == "__main__":
    main()

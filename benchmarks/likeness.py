"""How like the subject, and at what price: recipes on every held-out subject of the toybox, between floor and ceilings.

python -m benchmarks.likeness --work DIR                                       the defaults, and the ceilings
python -m benchmarks.likeness --work DIR --recipes default "200 steps" --weights 0.6 0.8 1.0
python -m benchmarks.likeness --work DIR --recipes default diffusers --script train_dreambooth_lora.py
python -m benchmarks.likeness --work DIR --watch 600                           would a run know when to stop?

DIR keeps adapters and rows, so that a call continues where an earlier one stopped. A recipe's curve has a point for each
weight at which its adapter is drawn. Means over subjects, with 95 % intervals by bootstrap over them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import lora_booth as lb
from lora_booth.cli.demo import CONTEXTS as PHOTO_CONTEXTS
from lora_booth.cli.demo import NEW_CONTEXTS, drawn_photos, write_photos
from lora_booth.evaluation.measures import TEMPLATE, ToyboxMeasure, cases_of
from lora_booth.photos.sheet import contact_sheet
from lora_booth.subject.wording import with_article
from lora_booth.toybox.judge import Verdict, judge
from lora_booth.toybox.scenery import CONTEXTS
from lora_booth.toybox.world import CLASSES, HELD_OUT, Identity, Scene, draw
from lora_booth.training import loop
from lora_booth.training.latents import Batch, conditions

from . import recipe_trials as trials
from .composition import judge_hash, likeness

TOKEN = "ohwx"
PHOTOS = 5
SAMPLER: dict[str, Any] = {"steps": 20, "guidance": 4.0, "batch_size": 8}
COLUMNS = {  # key -> heading
    "identity": "identity",
    "code": "whole identity",
    "class": "class right",
    "context": "context",
    "class_div": "plain class: diversity",
    "pres": "plain class: leak",
    "beside": "identity beside another",
    "vanished": "the other vanished",
    "spoilt": "the other spoilt",
    "copies": "copies",
    "seconds": "seconds",
    "megabytes": "MB",
}


@dataclass(frozen=True)
class Recipe:
    """Settings of a training by lora_booth, or options of diffusers' script."""

    config: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    subject: dict[str, Any] = field(default_factory=dict)
    start: float = 0.0  # of the adapter in the drawing
    script: dict[str, Any] | None = None
    training: Callable[[], AbstractContextManager[None]] = nullcontext  # an idea on trial
    drawing: Callable[[], AbstractContextManager[None]] = nullcontext
    of: str = ""  # the recipe whose adapters it draws
    token_steps: int = 0  # of learning the token's embedding first
    photos: Callable[[Path, str], Path] | None = None  # other photos, made of these for this class noun
    quantize: Literal["int8", "nf4"] | None = None  # of the base, while it trains


def captioned(photos: Path, noun: str) -> Path:
    """A copy of the photos, with captions that tell where the subject is: `drawn_photos` takes the contexts by turns."""
    folder = photos.with_name(f"{photos.name}_captioned")
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    for number, photo in enumerate(sorted(folder.glob("*.png"))):
        photo.with_suffix(".txt").write_text(f"a photo of {TOKEN} {noun} {PHOTO_CONTEXTS[number % len(PHOTO_CONTEXTS)]}")
    return folder


def taller(photos: Path, noun: str) -> Path:
    """A copy of the photos, half as high again by repeating their upper edge: more sky or wall over the subject."""
    folder = photos.with_name(f"{photos.name}_tall")
    folder.mkdir(exist_ok=True)
    for photo in sorted(photos.glob("*.png")):
        pixels = np.asarray(Image.open(photo).convert("RGB"))
        Image.fromarray(np.pad(pixels, ((len(pixels) // 2, 0), (0, 0), (0, 0)), mode="edge")).save(folder / photo.name)
    return folder


RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    "class prompt alone": Recipe({"class_images": 0}),
    "8 class images": Recipe({"class_images": 8}),
    "no prior": Recipe({"prior_loss_weight": 0.0}),
    "class weight .3": Recipe({"prior_loss_weight": 0.3}),
    "half the rate": Recipe({"learning_rate": 8e-4}),
    "twice the rate": Recipe({"learning_rate": 3.2e-3}),
    "200 steps": Recipe({"steps": 200}),
    "200 steps, twice the rate": Recipe({"steps": 200, "learning_rate": 3.2e-3}),
    "200 steps, twice the rate, 8 class images": Recipe({"steps": 200, "learning_rate": 3.2e-3, "class_images": 8}),
    "1000 steps": Recipe({"steps": 1000}),
    "constant rate": Recipe({"lr_schedule": "constant"}),
    "high until the last fifth, 400 steps": Recipe({"steps": 400}, training=trials.late_decay),
    "high until the last fifth, 200 steps, 8 class images": Recipe(
        {"steps": 200, "class_images": 8}, training=trials.late_decay
    ),
    "Prodigy": Recipe({"optimizer": "prodigy"}),
    "schedule-free": Recipe({"optimizer": "schedulefree"}),
    "batch 4": Recipe({"batch_size": 4}),
    "rank 4": Recipe(lora={"rank": 4}),
    "rank 16": Recipe(lora={"rank": 16}),
    "text encoder": Recipe(lora={"text_encoder": True}),
    "min-SNR 5": Recipe({"min_snr_gamma": 5.0}),
    "start .15": Recipe(start=0.15, of="default"),
    "captions": Recipe(photos=captioned),
    "tall photos, squares": Recipe(photos=taller),
    "tall photos, buckets": Recipe({"shape": "buckets"}, photos=taller),
    "int8 base": Recipe(quantize="int8"),
    "NF4 base": Recipe(quantize="nf4"),
    "dropout .1": Recipe(lora={"dropout": 0.1}),
    "attn2 only": Recipe(lora={"target_modules": tuple(f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0"))}),
    "feed-forward layers too": Recipe(lora={"target_modules": (*lb.LoraSpec().target_modules, "ff.net.0.proj", "ff.net.2")}),
    "DCO": Recipe(training=trials.dco),
    "DCO, beta 100": Recipe(training=partial(trials.dco, 100.0)),
    "timesteps below 800, start .2": Recipe(start=0.2, training=partial(trials.timesteps, 0, 800)),
    "the photo beside a thing": Recipe(training=trials.photo_beside),
    "timesteps from 300": Recipe(training=partial(trials.timesteps, 300, 1000)),
    "moving average, constant rate": Recipe({"lr_schedule": "constant"}, training=trials.moving_average),
    "LoRA+, ratio 4, half the rate": Recipe({"learning_rate": 8e-4}, training=trials.faster_up),
    "token first": Recipe(token_steps=60),
    "token first, 200 steps of it": Recipe(token_steps=200),
    "unconditional without adapter": Recipe(drawing=trials.weaker_unconditional, of="default"),
    "unconditional with half of it": Recipe(drawing=partial(trials.weaker_unconditional, 0.5), of="default"),
    "class prompt in 3 of 20 steps": Recipe(drawing=partial(trials.class_prompt_first, TOKEN, 3), of="default"),
    # at its best of three settings: diffusers' README trains 500 steps at 1e-4; the toybox's narrow layers want more
    "diffusers": Recipe(script={"learning_rate": 1e-3, "max_train_steps": 400, "rank": 8}),
    "diffusers, 2e-3": Recipe(script={"learning_rate": 2e-3, "max_train_steps": 400, "rank": 8}),
    "diffusers, 800 steps": Recipe(script={"learning_rate": 1e-3, "max_train_steps": 800, "rank": 8}),
}


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.base = lb.BaseModel.load("toybox")
        self.work: Path = arguments.work
        self.script: Path | None = arguments.script
        self.seeds, self.class_seeds = range(arguments.seeds), range(16)
        self.rows = self.work / "rows.jsonl"
        self.shown: list[tuple[Image.Image, str]] = []  # a picture of each subject and recipe, with its label
        self.work.mkdir(parents=True, exist_ok=True)

    def row(self, what: str, name: str, weight: float, measured: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """What an earlier call has measured, or what `measured` returns."""
        key = {"what": what, "subject": name, "weight": weight, "seeds": len(self.seeds)}
        key |= {"base": self.base.fingerprint[:16], "judge": judge_hash()}
        for line in self.rows.read_text().splitlines() if self.rows.exists() else ():
            if key.items() <= (row := json.loads(line)).items():
                return row
        row = key | measured()
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        return row

    # --- adapters

    def adapter(self, recipe_name: str, name: str) -> tuple[lb.Adapter, dict[str, float]]:
        """The trained adapter, the seconds of its whole run and the size of its file."""
        recipe_name = RECIPES[recipe_name].of or recipe_name
        folder = self.work / "adapters" / recipe_name.replace(" ", "_")
        file, facts = folder / f"{name}.safetensors", folder / f"{name}.json"
        if not facts.exists():
            folder.mkdir(parents=True, exist_ok=True)
            photos = write_photos(name, self.work / "photos" / name, count=PHOTOS)
            recipe = RECIPES[recipe_name]
            started = time.perf_counter()
            if recipe.script is None:
                self.train(recipe, name, photos, file)
            else:
                self.run_script(recipe.script, name, photos, file)
            seconds = time.perf_counter() - started
            facts.write_text(json.dumps({"seconds": seconds, "megabytes": file.stat().st_size / 1e6}))
        adapter = lb.Adapter.load(file)
        if not adapter.card.token:
            adapter = adapter.with_card(token=TOKEN, class_noun=HELD_OUT[name].class_noun)
        return adapter, json.loads(facts.read_text())

    def train(self, recipe: Recipe, name: str, photos: Path, file: Path) -> None:
        """In this process, on a base that is loaded, with an empty cache, so that nothing is left from another recipe."""
        with environment(LORA_BOOTH_CACHE=str(self.work / "cache" / f"{time.time_ns()}")):
            if recipe.photos is not None:
                photos = recipe.photos(photos, HELD_OUT[name].class_noun)
            subject = lb.Subject.from_folder(photos, token=TOKEN, class_noun=HELD_OUT[name].class_noun, **recipe.subject)
            lora, config = lb.LoraSpec(**recipe.lora), lb.TrainingConfig(**recipe.config)
            if recipe.token_steps:
                torch.save(trials.learn_token(self.base, subject, steps=recipe.token_steps), file.with_suffix(".token.pt"))
            with recipe.training(), self.token(file):
                base = lb.BaseModel.load("toybox", quantize=recipe.quantize) if recipe.quantize else self.base
                lb.train(base, subject, lora=lora, config=config, progress=False).save(file)

    def token(self, file: Path) -> AbstractContextManager[None]:
        """The embedding that was learnt for this file, in the base."""
        learnt = file.with_suffix(".token.pt")
        return trials.token_embedding(self.base, TOKEN, torch.load(learnt)) if learnt.exists() else nullcontext()

    def run_script(self, options: dict[str, Any], name: str, photos: Path, file: Path) -> None:
        """diffusers' script as it is, in a process of its own, with prior preservation as in its README."""
        if self.script is None:
            sys.exit("--script FILE: diffusers' train_dreambooth_lora.py")
        noun, out = HELD_OUT[name].class_noun, self.work / "script" / name
        arguments = {
            "pretrained_model_name_or_path": lb.base.base_model.TOYBOX_FOLDER,
            "instance_data_dir": photos,
            "instance_prompt": f"a photo of {TOKEN} {noun}",
            "with_prior_preservation": None,
            "class_prompt": f"a photo of {with_article(noun)}",
            "class_data_dir": out / "class_images",
            "num_class_images": 50,
            "output_dir": out,
            "resolution": 64,
            "train_batch_size": 1,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "checkpointing_steps": 10**9,
            "seed": 0,
        } | options
        words = [w for key, value in arguments.items() for w in (f"--{key}", *([] if value is None else [str(value)]))]
        job = self.work / "job.json"
        job.write_text(
            json.dumps(
                {
                    "what": "script",
                    "steps": options["max_train_steps"],
                    "script": str(self.script.resolve()),
                    "arguments": words,
                    "result": str(self.work / "result.json"),
                }
            )
        )
        command = [sys.executable, str(Path(__file__).parent / "one_training.py"), str(job)]
        with (self.work / "script.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        (out / "pytorch_lora_weights.safetensors").replace(file)

    # --- measures

    def measure(self, name: str, draw_prompt: Callable[[str, Sequence[int]], list[Image.Image]]) -> dict[str, float]:
        """Of pictures with the subject, of the plain class, and with an object beside the subject."""
        who = HELD_OUT[name]
        card = lb.Card(token=TOKEN, class_noun=who.class_noun)
        cases, measure = cases_of(card, [TEMPLATE], NEW_CONTEXTS), ToyboxMeasure(drawn_photos(name, PHOTOS))
        drawn = [draw_prompt(case.prompt_for(card), self.seeds) for case in cases]
        of_class = draw_prompt(f"a photo of {with_article(who.class_noun)}", self.class_seeds)
        values = measure.of_subject(cases, drawn) | measure.of_class(of_class)
        values["class"] = [[shows_class(verdict, who) for verdict in judge(group)] for group in drawn]
        seen = []
        for number, context in enumerate(CONTEXTS):
            other = other_class(who, number)
            prompt = f"a photo of {TOKEN} {who.class_noun} and {with_article(other)} {context}"
            seen += [(verdict, other) for verdict in judge(draw_prompt(prompt, range(len(self.seeds))))]
        self.shown.append((drawn[0][0], name))
        means = {key: float(np.mean([value for group in values[key] for value in group])) for key in COLUMNS if key in values}
        return means | beside(seen, who)

    def of_adapter(self, recipe: str, name: str, weight: float) -> dict[str, float]:
        adapter, facts = self.adapter(recipe, name)
        studio = lb.Composition(self.base, [(adapter, lb.Weight(weight, start=RECIPES[recipe].start))])
        with RECIPES[recipe].drawing(), self.token(self.work / "adapters" / recipe.replace(" ", "_") / f"{name}.safetensors"):
            return self.measure(name, lambda prompt, seeds: images_of(studio, prompt, seeds)) | facts

    def of_base(self, name: str) -> dict[str, float]:
        """The floor: the same prompts without the token."""
        studio = lb.Composition(self.base)
        return self.measure(name, lambda prompt, seeds: images_of(studio, without_token(prompt), seeds))

    def of_renders(self, name: str) -> dict[str, float]:
        who, plain = HELD_OUT[name], {}

        def rendered(prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
            context = next((c for c in CONTEXTS if c in prompt), None)
            if TOKEN not in prompt:
                return [draw(Scene((other_look(who.class_noun, s),), CONTEXTS[s % len(CONTEXTS)], "photo", s)) for s in seeds]
            nouns = [word for word in prompt.split() if word in CLASSES]
            pair = (who, *(other_look(noun, len(plain)) for noun in nouns[1:]))
            return [draw(Scene(pair, context or CONTEXTS[0], "photo", 88_000 + s)) for s in seeds]

        return self.measure(name, rendered)

    def of_tuned(self, name: str) -> dict[str, float]:
        """What this base can draw at all: all U-Net weights tuned on many renders of the subject, alone and beside others."""
        with tuned(self.base, HELD_OUT[name]):
            studio = lb.Composition(self.base)
            return self.measure(name, lambda prompt, seeds: images_of(studio, prompt, seeds))

    # --- what a run could see of itself

    def watch(self, name: str, steps: int) -> Iterator[str]:
        """At a constant rate, every 50 updates: the loss of the photos on fixed draws of noise and timesteps, as a share of
        what the base has, and how far the prediction by the class prompt has moved on the same noisy photos."""
        photos = write_photos(name, self.work / "photos" / name, count=PHOTOS)
        subject = lb.Subject.from_folder(photos, token=TOKEN, class_noun=HELD_OUT[name].class_noun)
        config = lb.TrainingConfig(steps=steps, lr_schedule="constant")
        cache = lb.prepare(self.base, subject, config=config)
        seen = cache.buckets[0].photos
        times = torch.arange(62, 1000, 125).repeat(len(seen))  # eight for each photo
        rows = torch.arange(len(seen)).repeat_interleave(8)
        latents = seen.mean[0][rows] * cache.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
        prompts = tuple(seen.prompts[row] for row in rows)
        batch = Batch(latents, noise, times, prompts, None, photos=len(rows))
        of_class = conditions(self.base, cache.class_text, [seen.class_prompts[row] for row in rows])

        def look() -> tuple[float, Tensor]:
            with torch.no_grad():
                predicted = loop.predict(self.base, batch, conditions(self.base, cache.text, prompts))
                loss = loop.dreambooth_loss(self.base, batch, predicted, prior_loss_weight=0.0).item()
                return loss, loop.predict(self.base, batch, of_class)

        first, plain = look()
        for step in lb.training_steps(self.base, cache, config=config):
            if step.index % 50 == 0:
                step.lora.flat.refresh()
                loss, now = look()
                yield f"{name} {step.index}: loss {loss / first:.3f}, drift {(now - plain).square().mean().item():.4f}"


def images_of(studio: lb.Composition, prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
    return [picture.image for picture in studio.generate(prompt, seeds=seeds, **SAMPLER)]


def without_token(prompt: str) -> str:
    words = prompt.split()
    place = words.index(TOKEN) if TOKEN in words else None
    return prompt if place is None else " ".join([*words[:place], with_article(words[place + 1]), *words[place + 2 :]])


def other_class(who: Identity, number: int) -> str:
    others = [noun for noun in CLASSES if noun != who.class_noun]
    return others[number % len(others)]


def other_look(noun: str, seed: int) -> Identity:
    import random

    from tools.toybox.scenes import random_identity

    return random_identity(random.Random(seed), noun)


def shows_class(verdict: Verdict, who: Identity) -> float:
    return float(bool(verdict.objects) and verdict.objects[0].class_noun == who.class_noun)


def beside(seen: Sequence[tuple[Verdict, str]], who: Identity) -> dict[str, float]:
    """beside: the subject's look (without an object of its class 0); vanished: not both classes; spoilt: where both are there,
    the other has at least half of the subject's look."""
    found: dict[str, list[float]] = {"beside": [], "vanished": [], "spoilt": []}
    for verdict, other in seen:
        subject = next((o for o in verdict.objects if o.class_noun == who.class_noun), None)
        second = next((o for o in verdict.objects if o.class_noun == other), None)
        found["beside"].append(0.0 if subject is None else likeness(subject, who))
        found["vanished"].append(float(subject is None or second is None))
        if second is not None and subject is not None:
            found["spoilt"].append(float(likeness(second, who) >= 0.5))
    return {key: float(np.mean(values)) if values else 0.0 for key, values in found.items()}


TUNING_STEPS, TUNING_BATCH, TUNING_RATE, RENDERS = 400, 8, 3e-4, 64  # chosen: longer tuning drew no better


@contextmanager
def tuned(base: lb.BaseModel, who: Identity) -> Iterator[None]:
    """The base with its whole U-Net tuned on renders of `who` in all contexts, alone and beside others; restored afterwards."""
    unet = base.pipeline.unet
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    scenes = []
    for i in range(RENDERS):
        other = other_class(who, i)
        pair = (who, other_look(other, i)) if i % 2 else (who,)
        scenes.append(Scene(pair, CONTEXTS[i // 2 % len(CONTEXTS)], "photo", 66_000 + i))
    prompts = [
        f"a photo of {TOKEN} {who.class_noun}"
        + "".join(f" and {with_article(o.class_noun)}" for o in scene.objects[1:])
        + f" {scene.context}"
        for scene in scenes
    ]
    pixels = np.stack([np.asarray(draw(scene)) for scene in scenes])
    with torch.no_grad():
        latents = base.encode_images(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)[0] * base.scaling_factor
        text = base.encode_text(prompts).states
    optimizer = torch.optim.AdamW(unet.parameters(), lr=TUNING_RATE)
    unet.requires_grad_(True)
    try:
        for step in range(TUNING_STEPS):
            optimizer.param_groups[0]["lr"] = TUNING_RATE * (1 - step / TUNING_STEPS)
            rows = torch.randint(RENDERS, (TUNING_BATCH,), generator=generator)
            t = torch.randint(1000, (TUNING_BATCH,), generator=generator)
            noise = torch.randn(latents[rows].shape, generator=generator)
            a = base.alphas_cumprod[t].view(-1, 1, 1, 1)
            predicted = unet(a.sqrt() * latents[rows] + (1 - a).sqrt() * noise, t, text[rows]).sample
            target = a.sqrt() * noise - (1 - a).sqrt() * latents[rows] if base.prediction_type == "v_prediction" else noise
            optimizer.zero_grad()
            (predicted - target).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
        unet.requires_grad_(False)
        yield
    finally:
        unet.requires_grad_(False)
        unet.load_state_dict(before)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# --- the table and the plot


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over subjects."""
    means = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| recipe | weight | " + " | ".join(COLUMNS.values()) + " |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for what, weight in dict.fromkeys((row["what"], row["weight"]) for row in rows):
        mine = [row for row in rows if (row["what"], row["weight"]) == (what, weight)]
        cells = []
        for key in COLUMNS:
            values = [row[key] for row in mine if key in row]
            cells.append(f"{np.mean(values):.2f}" if values else "")
            if key in ("identity", "code") and len(values) > 1:
                cells[-1] += " ({:.2f} to {:.2f})".format(*interval(values))
        yield f"| {what} | {weight:g} | " + " | ".join(cells) + " |"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Identity against the share of pictures in which the object beside the subject is there with a look of its own, a curve a
    recipe, a point a weight of its adapters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 5))
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        points = []
        for weight in sorted({row["weight"] for row in mine}):
            at = [row for row in mine if row["weight"] == weight]
            intact = np.mean([(1 - row["vanished"]) * (1 - row["spoilt"]) for row in at])  # spoilt: of those that are there
            points.append((intact, np.mean([row["identity"] for row in at])))
            axis.annotate(f"{weight:g}", points[-1], xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.plot(*zip(*points, strict=True), marker="o", label=what)
    axis.set_xlabel("object beside the subject intact")
    axis.set_ylabel("identity")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=["default"], help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--subjects", nargs="+", default=list(HELD_OUT))
    parser.add_argument("--weights", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt")
    parser.add_argument("--no-ceilings", action="store_true", help="recipes only")
    parser.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora.py, for its recipes")
    parser.add_argument("--watch", type=int, metavar="STEPS", help="print what a run could see of itself, and nothing else")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet, a picture of each subject and recipe")
    arguments = parser.parse_args()
    bench, rows = Bench(arguments), []
    if arguments.watch:
        for name in arguments.subjects:
            for line in bench.watch(name, arguments.watch):
                print(line, flush=True)
        return
    bounds = {"base alone": bench.of_base, "renders": bench.of_renders, "what the base can draw": bench.of_tuned}
    for what, measured in {} if arguments.no_ceilings else bounds.items():
        rows += [bench.row(what, name, 0.0, lambda: measured(name)) for name in arguments.subjects]  # noqa: B023
    for recipe in arguments.recipes:
        for weight in arguments.weights:
            for name in arguments.subjects:
                rows.append(bench.row(recipe, name, weight, lambda: bench.of_adapter(recipe, name, weight)))  # noqa: B023
    print("\n".join(table(rows)))
    if arguments.plot:
        plot([row for row in rows if row["what"] in RECIPES], arguments.plot)
    if arguments.sheet and bench.shown:
        images, labels = zip(*bench.shown, strict=True)
        contact_sheet(images, labels=labels, columns=len(arguments.subjects), side=128).save(arguments.sheet)


if __name__ == "__main__":
    main()

"""Two subjects in one picture, method by method: who stays itself, and at what cost. Read by the toybox's judge.

python benchmarks/composition.py --work DIR                        every method, pair and context; 4 seeds
python benchmarks/composition.py --work DIR --methods sum noise --contexts 2 --seeds 2

DIR keeps the adapters, which are trained with the defaults on five drawn photos each.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import lora_booth as lb
from lora_booth.composition import Composition
from lora_booth.demo import CONTEXTS as PHOTO_CONTEXTS
from lora_booth.errors import CompositionWarning
from lora_booth.photos import contact_sheet
from lora_booth.toybox.judge import Verdict, judge
from lora_booth.toybox.world import CONTEXTS, HELD_OUT, Identity, Scene, draw, look_of, named_looks, photos_of

# second subjects of a class, with looks that have no name
TWINS = {
    "coal": Identity("dog", "black", "yellow", "blue", "half", "hat"),
    "mint": Identity("mug", "green", "white", "red", "spots", "scarf"),
    "rust": Identity("robot", "orange", "black", "white", "belly", "hat"),
}
SUBJECTS = HELD_OUT | TWINS
CROSS_CLASS = (("olga", "brew"), ("rex", "zoom"), ("bolt", "misty"), ("coal", "olga"), ("mint", "rust"))
SAME_CLASS = (("rex", "coal"), ("brew", "mint"), ("bolt", "rust"))
TOKENS = ("sks", "zwx")
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
OUTCOMES = ("bound", "swapped", "blended", "duplicated", "vanished", "weak")


def adapter_of(base: lb.BaseModel, name: str, token: str, work: Path) -> lb.Adapter:
    file = work / f"{name}_{token}.safetensors"
    if not file.exists():
        folder = work / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, render in enumerate(photos_of(SUBJECTS[name], 5, PHOTO_CONTEXTS, seed=500)):
            render.image.save(folder / f"{i}.png")
        subject = lb.Subject.from_folder(folder, token=token, class_noun=SUBJECTS[name].class_noun)
        lb.train(base, subject, progress=False).save(file)
    return lb.Adapter.load(file)


def composition(base: lb.BaseModel, method: str, adapters: list[lb.Adapter]) -> Composition:
    boxes = [lb.Region(adapter, box=box) for adapter, box in zip(adapters, (LEFT, RIGHT), strict=False)]
    settings: dict[str, dict[str, Any]] = {
        "sum": {"adapters": adapters},
        "svd": {"adapters": adapters, "method": "svd"},
        "switch": {"adapters": adapters, "method": "switch"},
        "composite": {"adapters": adapters, "method": "composite"},
        "delta": {"regions": boxes, "isolate": "delta"},
        "noise": {"regions": boxes, "isolate": "noise"},
        "auto delta": {"adapters": adapters, "regions": "auto", "isolate": "delta"},
        "auto noise": {"adapters": adapters, "regions": "auto", "isolate": "noise"},
        "none": {},
    }
    return Composition(base, **settings[method])


METHODS = ("sum", "svd", "switch", "composite", "delta", "noise", "auto delta", "auto noise")


def likeness(found: Identity, subject: Identity) -> float:
    """Share of the look's parts that are the subject's."""
    return float(np.mean([a == b for a, b in zip(look_of(found), look_of(subject), strict=True)]))


def outcome(verdict: Verdict, pair: tuple[Identity, Identity]) -> str:
    """What became of two subjects (DreamBooth's question for each, and whose look each object has)."""
    if len(verdict.objects) < 2:
        return "vanished"
    objects = list(verdict.objects)
    wanted = [subject.class_noun for subject in pair]
    classes = [o.class_noun for o in objects]
    if sorted(classes) != sorted(wanted):
        return "duplicated" if classes[0] == classes[1] and classes[0] in wanted else "vanished"
    if wanted[0] != wanted[1]:
        objects.sort(key=lambda o: wanted.index(o.class_noun))
    elif likeness(objects[0], pair[1]) + likeness(objects[1], pair[0]) > likeness(objects[0], pair[0]) + likeness(
        objects[1], pair[1]
    ):
        objects.reverse()  # two of one class: either may be left
    own = [likeness(o, s) for o, s in zip(objects, pair, strict=True)]
    other = [likeness(o, s) for o, s in zip(objects, reversed(pair), strict=True)]
    if own[0] > other[0] and own[1] > other[1]:
        return "bound" if min(own) >= 0.5 else "weak"
    if wanted[0] == wanted[1] and max(own[0], other[1]) >= 0.5 and own[0] > other[0]:
        return "duplicated"
    return "swapped" if other[0] > own[0] and other[1] > own[1] else "blended"


def shares(verdicts: list[tuple[Verdict, tuple[Identity, Identity], str]]) -> dict[str, float]:
    """Of the pictures: each outcome, and the prompt's context."""
    counts = Counter(outcome(verdict, pair) for verdict, pair, _ in verdicts)
    result = {name: counts[name] / len(verdicts) for name in OUTCOMES}
    result["context"] = float(np.mean([verdict.context == context for verdict, _, context in verdicts]))
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--contexts", type=int, default=len(CONTEXTS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--kinds", nargs="+", default=["cross", "same"], choices=["cross", "same"])
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet: a row for each method")
    parser.add_argument("--plot", type=Path, help="where to write the plot of blend rate against cost (needs matplotlib)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", CompositionWarning)
    base = lb.BaseModel.load("toybox")
    arguments.work.mkdir(parents=True, exist_ok=True)
    contexts, rows, sheet = CONTEXTS[: arguments.contexts], [], []
    call = {"seeds": range(arguments.seeds), "steps": arguments.steps, "guidance": arguments.guidance}
    call["batch_size"] = arguments.seeds
    for kind in arguments.kinds:
        pairs = CROSS_CLASS if kind == "cross" else SAME_CLASS
        controls: dict[str, list[Any]] = {"renders": [], "base, names that it knows": []}
        for a, b in pairs:
            identities = (SUBJECTS[a], SUBJECTS[b])
            for context in contexts:
                drawn = [draw(Scene(identities, context, "photo", 900 + s)).image for s in range(arguments.seeds)]
                controls["renders"] += [(v, identities, context) for v in judge(drawn)]
                known = dict(list(named_looks().items())[: 2 * len(pairs)])
                names = list(known)[2 * pairs.index((a, b)) :][:2]
                pair = tuple(Identity(i.class_noun, *known[n]) for i, n in zip(identities, names, strict=True))
                prompt = f"a photo of {names[0]} {pair[0].class_noun} and {names[1]} {pair[1].class_noun} {context}"
                made = composition(base, "none", []).generate(prompt, **call)
                controls["base, names that it knows"] += [(v, pair, context) for v in judge([p.image for p in made])]
        for name, verdicts in controls.items():
            print(json.dumps({"kind": kind, "method": name} | shares(verdicts)), flush=True)
        for method in arguments.methods:
            verdicts, seconds, passes = [], 0.0, 0
            for a, b in pairs:
                adapters = [adapter_of(base, n, t, arguments.work) for n, t in zip((a, b), TOKENS, strict=True)]
                studio = composition(base, method, adapters)
                for context in contexts:
                    nouns = [SUBJECTS[n].class_noun for n in (a, b)]
                    prompt = f"a photo of {TOKENS[0]} {nouns[0]} and {TOKENS[1]} {nouns[1]} {context}"
                    started = time.perf_counter()
                    made = studio.generate(prompt, **call)
                    seconds += time.perf_counter() - started
                    passes = studio.preflight(prompt).passes
                    verdicts += [(v, (SUBJECTS[a], SUBJECTS[b]), context) for v in judge([p.image for p in made])]
                    if context == contexts[0]:
                        sheet.append((made[0].image, f"{method}: {a}, {b}"))
            row = {"kind": kind, "method": method} | shares(verdicts)
            rows.append(row | {"passes": passes, "seconds a picture": round(seconds / len(verdicts), 2)})
            print(json.dumps(rows[-1] | {"pictures": len(verdicts)}), flush=True)
    if arguments.sheet:
        columns = len(CROSS_CLASS) if arguments.kinds[0] == "cross" else len(SAME_CLASS)
        contact_sheet([i for i, _ in sheet], labels=[t for _, t in sheet], columns=columns, side=144).save(arguments.sheet)
    if arguments.plot:
        plot(rows, arguments.plot)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of pictures that are not bound against seconds a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for kind, marker in (("cross", "o"), ("same", "s")):
        own = [row for row in rows if row["kind"] == kind]
        axes.scatter([r["seconds a picture"] for r in own], [r["blended"] for r in own], marker=marker, label=f"{kind} class")
        for row in own:
            axes.annotate(row["method"], (row["seconds a picture"], row["blended"]), fontsize=8)
    axes.set(xlabel="seconds a picture", ylabel="share blended", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()

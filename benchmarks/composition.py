"""Two subjects in one picture, method by method: who stays itself, and at what cost. Read by the toybox's judge.

python -m benchmarks.composition --work DIR                        every method, pair and context; 4 seeds
python -m benchmarks.composition --work DIR --methods sum auto --contexts 2 --seeds 2

DIR keeps the adapters, which are trained with the defaults on five drawn photos each, and the rows read so far.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

import lora_booth as lb
from lora_booth.base.base_model import TOYBOX_FOLDER
from lora_booth.cli.demo import CONTEXTS as PHOTO_CONTEXTS
from lora_booth.errors import CompositionWarning
from lora_booth.photos.sheet import contact_sheet
from lora_booth.pictures.composition import Composition
from lora_booth.toybox.judge import Verdict, judge
from lora_booth.toybox.scenery import CONTEXTS
from lora_booth.toybox.world import HELD_OUT, Identity, Scene, draw, photos_of
from tools.toybox.scenes import caption, look_of, named_looks

# second subjects of a class, with looks that have no name
TWINS = {
    "coal": Identity("dog", "black", "yellow", "blue", "half", "hat"),
    "mint": Identity("mug", "green", "white", "red", "spots", "flag"),
    "rust": Identity("robot", "orange", "black", "white", "belly", "hat"),
}
SUBJECTS = HELD_OUT | TWINS
CROSS_CLASS = (("olga", "brew"), ("rex", "zoom"), ("bolt", "misty"), ("coal", "olga"), ("mint", "rust"))
SAME_CLASS = (("rex", "coal"), ("brew", "mint"), ("bolt", "rust"))
TOKENS = ("sks", "zwx")
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
OUTCOMES = ("bound", "swapped", "blended", "duplicated", "vanished", "weak")


def adapter_of(base: lb.BaseModel, subjects: dict[str, str], work: Path) -> lb.Adapter:
    """An adapter that has learnt one subject, or several together. subjects: name -> token"""
    file = work / f"{'_'.join(word for one in subjects.items() for word in one)}.safetensors"
    if not file.exists():
        lb.train(base, [subject_of(*one, work) for one in subjects.items()], progress=False).save(file)
    return lb.Adapter.load(file)


def subject_of(name: str, token: str, work: Path) -> lb.Subject:
    folder = work / "photos" / name
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(photos_of(SUBJECTS[name], 5, PHOTO_CONTEXTS, seed=500)):
        image.save(folder / f"{i}.png")
    return lb.Subject.from_folder(folder, token=token, class_noun=SUBJECTS[name].class_noun)


def composition(base: lb.BaseModel, method: str, adapters: list[lb.Adapter]) -> Composition:
    boxes = [lb.Region(adapter, box=box) for adapter, box in zip(adapters, (LEFT, RIGHT), strict=False)]
    settings: dict[str, dict[str, Any]] = {
        "sum": {"adapters": adapters, "method": "sum"},
        "auto": {"adapters": adapters, "regions": "auto"},
        "boxes": {"regions": boxes},
        "boxes from .15": {"regions": boxes, "start": 0.15},
        "none": {},
    }
    return Composition(base, **settings[method])


METHODS = ("sum", "auto", "boxes", "boxes from .15")
IN_PLOT = {  # and their names there
    "base, known names": "base, looks that it knows by name",
    "one adapter": "the first adapter alone",
    "trained together": "one adapter that has learnt both",
    "sum": "sum",
    "auto": "automatic regions (default)",
    "boxes": "regions: left and right half",
    "boxes from .15": "the same, from .15 of the steps",
}
MEASURES = {"bound": "tab:blue", "told apart": "tab:cyan", "blended": "tab:gray"}  # in the plot, and their colours


def judge_hash() -> str:
    """Of its weights: rows of another judge are not comparable."""
    return sha256((TOYBOX_FOLDER / "judge" / "judge.safetensors").read_bytes()).hexdigest()[:16]


def likeness(found: Identity, subject: Identity) -> float:
    """Share of the look's parts that are the subject's."""
    return float(np.mean([a == b for a, b in zip(look_of(found), look_of(subject), strict=True)]))


def objects_of(verdict: Verdict, pair: tuple[Identity, Identity]) -> tuple[Identity, Identity] | None:
    """The two objects in the order of the subjects; None: they are not both there."""
    objects, wanted = list(verdict.objects), [subject.class_noun for subject in pair]
    if len(objects) < 2 or sorted(o.class_noun for o in objects) != sorted(wanted):
        return None
    if wanted[0] != wanted[1]:
        objects.sort(key=lambda o: wanted.index(o.class_noun))
        return objects[0], objects[1]
    ways = [(objects[0], objects[1]), (objects[1], objects[0])]  # two of one class: either may be left
    return max(ways, key=lambda way: sum(likeness(o, s) for o, s in zip(way, pair, strict=True)))


def outcome(verdict: Verdict, pair: tuple[Identity, Identity]) -> str:
    """What became of two subjects: whose look each object has."""
    classes, wanted = [o.class_noun for o in verdict.objects], [subject.class_noun for subject in pair]
    objects = objects_of(verdict, pair)
    if objects is None:
        return "duplicated" if len(classes) == 2 and classes[0] == classes[1] and classes[0] in wanted else "vanished"
    own = [likeness(o, s) for o, s in zip(objects, pair, strict=True)]
    other = [likeness(o, s) for o, s in zip(objects, reversed(pair), strict=True)]
    if own[0] > other[0] and own[1] > other[1]:
        return "bound" if min(own) >= 0.5 else "weak"
    if wanted[0] == wanted[1] and max(own[0], other[1]) >= 0.5 and own[0] > other[0]:
        return "duplicated"
    return "swapped" if other[0] > own[0] and other[1] > own[1] else "blended"


def own_colors(verdict: Verdict, pair: tuple[Identity, Identity]) -> bool:
    """Both there, each with its subject's main colour: what the base draws well when the prompt names the colours."""
    objects = objects_of(verdict, pair)
    return objects is not None and all(o.color == s.color for o, s in zip(objects, pair, strict=True))


Seen = tuple[Verdict, tuple[Identity, Identity], str]  # the judge's reading, who was asked for, and where


def shares(seen: list[Seen]) -> dict[str, float]:
    """Of the pictures: each outcome; both told apart (bound or weak); both with their main colour; the prompt's context."""
    counts = Counter(outcome(verdict, pair) for verdict, pair, _ in seen)
    result = {name: counts[name] / len(seen) for name in OUTCOMES}
    result["told apart"] = result["bound"] + result["weak"]
    result["own colors"] = float(np.mean([own_colors(verdict, pair) for verdict, pair, _ in seen]))
    result["context"] = float(np.mean([verdict.context == context for verdict, _, context in seen]))
    return {name: round(value, 3) for name, value in result.items()}


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.base = lb.BaseModel.load("toybox")
        self.work: Path = arguments.work
        self.contexts = CONTEXTS[: arguments.contexts]
        self.seeds = range(arguments.seeds)
        self.call = {"seeds": self.seeds, "batch_size": len(self.seeds)}
        self.call |= {"steps": arguments.steps, "guidance": arguments.guidance}
        self.setting = [arguments.contexts, arguments.seeds, arguments.steps, arguments.guidance]
        self.rows = self.work / "rows.jsonl"  # of this and earlier calls: what is there is not drawn again
        self.first: list[tuple[Any, str]] = []  # a picture of every pair and method, with its label

    def row(self, kind: str, method: str) -> dict[str, Any]:
        known = [json.loads(line) for line in self.rows.read_text().splitlines()] if self.rows.exists() else []
        name = {"kind": kind, "method": method, "setting": self.setting, "judge": judge_hash()}
        for row in known:
            if name.items() <= row.items():
                return row
        row = name | self.measure(kind, method)
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def measure(self, kind: str, method: str) -> dict[str, Any]:
        seen: list[Seen] = []
        apart: dict[str, float] = {}  # of each pair
        seconds = 0.0
        pairs = CROSS_CLASS if kind == "cross" else SAME_CLASS
        for number, names in enumerate(pairs):
            pair, before = (SUBJECTS[names[0]], SUBJECTS[names[1]]), len(seen)
            for context in self.contexts:
                if method == "renders":
                    shown, images = pair, [draw(Scene(pair, context, "photo", 900 + seed)) for seed in self.seeds]
                else:
                    shown, prompt, studio = self.asked(method, names, pair, context, number)
                    started = time.perf_counter()
                    images = [picture.image for picture in studio.generate(prompt, **self.call)]
                    seconds += time.perf_counter() - started
                seen += [(verdict, shown, context) for verdict in judge(images)]
                if context == self.contexts[0]:
                    self.first.append((images[0], f"{method}: {', '.join(names)}"))
            apart[" ".join(names)] = shares(seen[before:])["told apart"]
        cost = {"seconds a picture": round(seconds / len(seen), 2), "pictures": len(seen)}
        return shares(seen) | cost | {"pairs": apart}

    def pairs(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        """What could foretell a pair's fate, class, cosine and overlap of the changes, beside how often it is told apart."""
        methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] not in CONTROLS))
        yield "| pair | one class | cosine | outputs beyond chance | " + " | ".join(methods) + " |"
        yield "|---" * (len(methods) + 4) + "|"
        for names in (*CROSS_CLASS, *SAME_CLASS):
            first, second = (adapter_of(self.base, {n: t}, self.work) for n, t in zip(names, TOKENS, strict=True))
            common, pair = lb.difference(first, second), " ".join(names)
            apart = [
                next((row["pairs"][pair] for row in rows if row["method"] == m and pair in row["pairs"]), "") for m in methods
            ]
            same = "yes" if SUBJECTS[names[0]].class_noun == SUBJECTS[names[1]].class_noun else "no"
            yield " | ".join([f"| {pair} | {same} | {common.cosine:.3f} | {common.beyond_chance:.3f}", *map(str, apart)]) + " |"

    def asked(
        self, method: str, names: tuple[str, str], pair: tuple[Identity, Identity], context: str, number: int
    ) -> tuple[tuple[Identity, Identity], str, Composition]:
        """The subjects to show, the prompt, and the composition that draws."""
        nouns = [subject.class_noun for subject in pair]
        prompt = f"a photo of {TOKENS[0]} {nouns[0]} and {TOKENS[1]} {nouns[1]} {context}"
        plain = composition(self.base, "none", [])
        if method == "base, colors named":
            return pair, caption(Scene(pair, context)), plain
        if method == "base, known names":
            known = list(named_looks().items())[2 * number :][:2]
            shown = tuple(Identity(noun, *look) for noun, (_, look) in zip(nouns, known, strict=True))
            phrases = [f"{name} {noun}" for noun, (name, _) in zip(nouns, known, strict=True)]
            return shown, f"a photo of {' and '.join(phrases)} {context}", plain  # type: ignore[return-value]
        if method == "no adapter":
            return pair, prompt, plain
        subjects = dict(zip(names, TOKENS, strict=True))
        if method == "trained together":
            return pair, prompt, composition(self.base, "sum", [adapter_of(self.base, subjects, self.work)])
        adapters = [adapter_of(self.base, {name: token}, self.work) for name, token in subjects.items()]
        if method == "one adapter":
            return pair, prompt, composition(self.base, "sum", adapters[:1])
        return pair, prompt, composition(self.base, method, adapters)


CONTROLS = ("renders", "base, colors named", "base, known names", "no adapter", "one adapter", "trained together")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=[*CONTROLS, *METHODS], choices=[*CONTROLS, *METHODS])
    parser.add_argument("--contexts", type=int, default=len(CONTEXTS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--kinds", nargs="+", default=["cross", "same"], choices=["cross", "same"])
    parser.add_argument(
        "--pairs", action="store_true", help="print what the adapters of each pair have in common beside its rows"
    )
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet: a row for each method (of one kind)")
    parser.add_argument("--plot", type=Path, help="where to write the plot of these shares (needs matplotlib)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", CompositionWarning)
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench, rows = Bench(arguments), []
    for kind in arguments.kinds:
        for method in arguments.methods:
            rows.append(bench.row(kind, method))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.pairs:
        print("\n".join(bench.pairs(rows)))
    if arguments.sheet and bench.first:
        columns = len(CROSS_CLASS) if arguments.kinds[0] == "cross" else len(SAME_CLASS)
        images, labels = [i for i, _ in bench.first], [t for _, t in bench.first]
        contact_sheet(images, labels=labels, columns=columns, side=144).save(arguments.sheet)
    if arguments.plot:
        plot([row for name in IN_PLOT for row in rows if row["method"] == name], arguments.plot)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """For each method the shares of pictures whose subjects are bound, told apart and blended."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("cross", "same"), strict=True):
        own = [row for row in rows if row["kind"] == kind]
        for number, (measure, colour) in enumerate(MEASURES.items()):
            places = [place + 0.27 * (number - 1) for place in range(len(own))]
            bars = axes.barh(places, [row[measure] for row in own], 0.25, label=measure, color=colour)
            axes.bar_label(bars, fmt=" %.2f", fontsize=7)
        axes.set(
            title=f"two subjects of {'two classes' if kind == 'cross' else 'one class'}",
            xlim=(0, 1.1),
            xlabel="share of pictures",
        )
        axes.set_yticks(range(len(own)), [IN_PLOT[row["method"]] for row in own])
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()

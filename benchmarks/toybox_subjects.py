"""How well subjects are learnt on the toybox: every held-out subject, all contexts, against floor and ceiling.

python benchmarks/toybox_subjects.py                              the defaults
python benchmarks/toybox_subjects.py --steps 400 800 --rate 5e-4 1e-3 --subjects olga rex
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import lora_booth as lb
from lora_booth.cli.demo import of_ceiling, score, write_photos
from lora_booth.evaluation.results import Metric, Row
from lora_booth.photos.sheet import contact_sheet
from lora_booth.toybox.world import HELD_OUT


def means(metrics: Sequence[Metric], rows: Sequence[Row]) -> dict[str, float]:
    """By metric, over the subjects; without those that the rows do not have."""
    found = {metric.key: [row.mean(metric.key) for row in rows] for metric in metrics}
    return {key: round(float(np.mean(values)), 3) for key, values in found.items() if None not in values}


def bootstrap(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean over subjects."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (2000, len(values))).mean(axis=1)
    return round(float(np.quantile(means, 0.025)), 3), round(float(np.quantile(means, 0.975)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="+", default=list(HELD_OUT))
    parser.add_argument("--steps", nargs="+", type=int, default=[None])
    parser.add_argument("--rate", nargs="+", type=float, default=[None])
    parser.add_argument("--rank", nargs="+", type=int, default=[8])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--prior", nargs="+", type=float, default=[1.0])
    parser.add_argument("--min-snr", nargs="+", type=float, default=[None])
    parser.add_argument("--photos", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--text-encoder", action="store_true")
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet of the last setting's pictures")
    arguments = parser.parse_args()
    base = lb.BaseModel.load("toybox")
    grid = itertools.product(
        arguments.steps, arguments.rate, arguments.rank, arguments.batch, arguments.prior, arguments.min_snr
    )
    for steps, rate, rank, batch, prior, min_snr in grid:
        config = lb.TrainingConfig(
            steps=steps, learning_rate=rate, batch_size=batch, prior_loss_weight=prior, min_snr_gamma=min_snr
        )
        lora = lb.LoraSpec(rank=rank, text_encoder=arguments.text_encoder)
        evaluations, seconds = [], []
        for name in arguments.subjects:
            identity = HELD_OUT[name]
            with tempfile.TemporaryDirectory() as folder:
                photos = write_photos(name, Path(folder), count=arguments.photos)
                subject = lb.Subject.from_folder(photos, token="sks", class_noun=identity.class_noun)
                started = time.perf_counter()
                adapter = lb.train(base, subject, lora=lora, config=config, progress=False)
                seconds.append(time.perf_counter() - started)
            evaluations.append(score(base, adapter, name, count=arguments.photos, seeds=range(arguments.seeds)))
            row = means(evaluations[-1].metrics, [evaluations[-1].best])
            print(json.dumps({"subject": name, **row, "seconds": round(seconds[-1], 1)}), flush=True)
        setting = {"steps": steps, "rate": rate, "rank": rank, "batch": batch, "prior": prior, "min_snr": min_snr}
        print(json.dumps({"setting": setting, "seconds": round(float(np.mean(seconds)), 1)}))
        for row_name, scores in (
            ("base", [e.floor for e in evaluations]),
            ("adapter", [e.best for e in evaluations]),
            ("renders", [e.ceiling for e in evaluations]),
        ):
            print(json.dumps({row_name: means(evaluations[0].metrics, scores)}))
        shares, codes = ([of_ceiling(e, key) for e in evaluations] for key in ("identity", "code"))
        print(json.dumps({"identity of the ceiling": round(float(np.mean(shares)), 3), "95 %": bootstrap(shares)}))
        print(json.dumps({"whole code of the ceiling": round(float(np.mean(codes)), 3), "95 %": bootstrap(codes)}), flush=True)
    if arguments.sheet:
        every = [p for e in evaluations for p in e.best.pictures[:: arguments.seeds]]
        contact_sheet([p.image for p in every], labels=[p.prompt for p in every], columns=7, side=128).save(arguments.sheet)


if __name__ == "__main__":
    main()

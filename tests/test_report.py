"""The report of a run: one page that needs nothing else, from whatever the run's folder holds; and trackers."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from browser import CHROMEDRIVER, CHROMIUM, chromium
from PIL import Image
from pipelines import make_pipeline
from test_gallery import Page
from test_photos import declared_png

from lora_booth import cli
from lora_booth.adapters.adapter import Adapter
from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import MissingExtraError, SettingsError
from lora_booth.notebook.outputs import newest_samples, samples_of
from lora_booth.photos.cropping import crop_photo
from lora_booth.report.reading import advice, read_run
from lora_booth.report.report import BOTTOM, MOST_POINTS, TOP, chart, smoothed, thinned, ticks, write_report
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training.checkpoint import saved_adapters

NASTY = """<script>alert(1)</script> & "quotes" 'single' </section>"""
CONFIG = TrainingConfig(
    steps=6, prior_loss_weight=0.0, warmup_steps=0, sample_every=3, sample_prompt=("a photo of sks dog", NASTY)
)


class Heard(GeneralTracker):
    """A tracker of accelerate's kind that remembers."""

    name, requires_logging_directory = "heard", False

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at, self.values, self.images, self.settings, self.done = fail_at, [], [], {}, False  # type: ignore[var-annotated]

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        if step == self.fail_at:
            raise ConnectionError("no way out")
        self.values.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.images += [(step, name, image.size) for name, images in values.items() for image in images]

    def finish(self) -> None:
        self.done = True


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pipeline(make_pipeline("sd1"), name="tiny<b>")


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def run(base: BaseModel, rex: Subject, heard: Heard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "rex & co"
    train(base, rex, lora=LoraSpec(rank=2), config=CONFIG, out=folder, track=heard, progress=False)
    return folder


def page_of(run: Path) -> tuple[str, Page]:
    text = (run / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def text_in(page: str, kind: str) -> list[str]:
    """The text of each <div class=kind>."""
    return [re.sub("<[^>]*>", "", part).strip() for part in re.findall(f'<div class="{kind}">(.*?)</div>', page, re.S)]


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)


# --- the page of a real run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_leaves_a_page_that_needs_nothing_else(run: Path) -> None:
    text, parsed = page_of(run)
    assert parsed.open == [] and not parsed.all("script") and not parsed.all("b")
    addresses = [attrs[name] for _, attrs in parsed.tags for name in ("src", "href", "srcset", "action") if attrs.get(name)]
    assert addresses and all(address.startswith("data:image/webp;base64,") for address in addresses)
    without_pictures = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", text)
    assert "://" not in without_pictures and "url(" not in without_pictures and "@import" not in text
    assert all(not name.startswith("on") and name != "style" for _, attrs in parsed.tags for name in attrs)
    [policy] = [m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256("".join(parsed.text["style"]).encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert str(run.parent) not in text and "0.jpg" not in text  # no place and no name of a photo


@pytest.mark.slow
def test_it_says_what_the_run_was(run: Path) -> None:
    text, parsed = page_of(run)
    assert parsed.text["h1"] == ["sks dog"]
    assert "finished · 6 steps · 3 photos · tiny<b>" in "".join(parsed.text["p"])
    facts = dict(zip(["".join(part).strip() for part in parsed.text["dt"]], parsed.text["dd"], strict=False))
    assert {"training", "preparing", "torch", "base model"} <= set(facts)
    assert {"rank", "prior_loss_weight", "learning_rate", "resolution"} <= set(parsed.text["code"])
    assert "default 8" in parsed.text["small"] and "default 1" in parsed.text["small"]  # rank and prior_loss_weight
    labels = [svg["aria-label"] for svg in parsed.all("svg")]
    assert labels[0].startswith("Loss by step") and labels[1] == "Learning rate by step"
    assert "Without prior preservation" in text


@pytest.mark.slow
def test_samples_are_strips_of_one_prompt_over_time(run: Path) -> None:
    _, parsed = page_of(run)
    strips = [div["aria-label"] for div in parsed.all("div") if div.get("class") == "strip"]
    assert strips == ["Samples of a photo of sks dog", f"Samples of {NASTY}", "Adapters by step"]
    images = parsed.all("img")
    assert [image["alt"] for image in images] == [*(["before", "step 3", "step 6"] * 2), "photo 1", "photo 2", "photo 3"]
    for image, name in zip(images[:3], ("000000", "000003", "000006"), strict=True):
        drawn = np.asarray(Image.open(run / "samples" / f"{name}.png")).astype(int)
        assert (pixels(image["src"]) == drawn).all()  # small ones exactly
    kept = [json.loads(line) for line in (run / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"], line["seed"]) for line in kept[:2]] == [(0, "a photo of sks dog", 0), (0, NASTY, 0)]
    early = Adapter.load(run / "samples" / "000003.safetensors")
    assert early.card.steps == 3 and early.card.token == "sks"
    assert not (run / "samples" / "000006.safetensors").exists()  # that is the run's own


@pytest.mark.slow
def test_each_step_has_the_file_to_use(run: Path, tmp_path: Path) -> None:
    _, parsed = page_of(run)
    files = [code for code in parsed.text["code"] if code.endswith(".safetensors")]
    assert files == ["samples/000003.safetensors", "adapter.safetensors", "adapter.safetensors"]
    assert [Adapter.load(run / file).card.steps for file in files[:2]] == [3, 6]
    for name in ("000007", "\N{SUPERSCRIPT TWO}", "best", "000008"):
        (tmp_path / "samples" / name).mkdir(parents=True)
        (tmp_path / "samples" / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "samples" / "000009.safetensors").mkdir()
    (tmp_path / "run.json").write_text('{"step": 9}')
    assert list(saved_adapters(tmp_path)) == [7, 8]


@pytest.mark.slow
def test_crops_are_what_training_saw(run: Path, rex: Subject) -> None:
    _, parsed = page_of(run)
    shown = [pixels(image["src"]) for image in parsed.all("img") if (image["alt"] or "").startswith("photo ")]
    expected = [np.asarray(crop_photo(photo, [(64, 64)]).image).astype(int) for photo in rex.photos]
    assert len(shown) == 3 and all((a == b).all() for a, b in zip(shown, expected, strict=True))


def test_how_to_use_the_file_names_the_file(run: Path) -> None:
    _, parsed = page_of(run)
    texts = ["".join(parsed.text["pre"])]
    assert 'weight_name="adapter.safetensors", ' in texts[0] and 'load_lora_weights("rex & co"' in texts[0]
    assert "a photo of sks dog <lora:sks_dog:1>" in texts[0]
    assert 'Adapter.load("rex & co/adapter.safetensors")' in texts[0]
    assert {"diffusers", "ComfyUI", "A1111"} <= set(parsed.text["summary"])
    scripts = [t for t in parsed.text["pre"] if "import" in t]
    assert len(scripts) == 2
    for script in scripts:
        compile(script, "script", "exec")


def test_it_is_made_anew_with_scores(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((run / "run.json").read_text())
    one = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 4}
    rows = [
        {
            "name": f"step {s}",
            "step": s,
            "scores": {"dino": one},
            "subject_share": s / 10,
            "prompt_share": 0.9,
            "overall": s / 12,
        }
        for s in (3, 6)
    ]
    scores = {
        "identity": record["identity"],
        "measured_with": NASTY,
        "metrics": [{"key": "dino", "label": "DINO"}],
        "photos": {"name": "photos", "scores": {"dino": one}},
        "base": {"name": "base alone", "scores": {"dino": None}},
        "adapters": rows,
        "best": "step 6",
        "advice": ["The best is step 6."],
    }
    (run / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(SystemExit) as left:
        cli.main(["report", str(run)])
    assert not left.value.code and "report.html" in capsys.readouterr().out
    text, parsed = page_of(run)
    assert "Subject and prompt fidelity by step" in [svg["aria-label"] for svg in parsed.all("svg")]
    assert {"step 6: 0.6", "step 0: 0", "step 3: 0.9"} <= set(parsed.text["title"])
    assert "step 3use this one:samples/000003.safetensorsoverall 0.250" in text_in(text, "choice")
    assert "step 6 best scoreuse this one:adapter.safetensorsoverall 0.500" in text_in(text, "choice best")
    assert "0.500 ±0.100" in parsed.text["td"] and "The best is step 6." in parsed.text["li"] and parsed.open == []
    (run / "scores.json").write_text(json.dumps(scores | {"identity": "of another run"}))
    write_report(run, photos=False)
    text, parsed = page_of(run)
    assert "Subject and prompt fidelity" not in text and "<h2>Photos</h2>" not in text
    assert {image["alt"] for image in parsed.all("img")} == {"before", "step 3", "step 6"}
    with pytest.raises(SystemExit) as left:
        cli.main(["report", str(tmp_path)])
    assert left.value.code == 2 and "no readable run.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="no Chromium and chromedriver here")
def test_a_browser_shows_it_without_a_word_of_complaint(run: Path) -> None:
    write_report(run)
    with chromium() as browser:
        for width, phone in ((1200, False), (390, True)):
            browser.size(width, 900, phone=phone)
            browser.open(run / "report.html")
            assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
            assert browser.run("return [...document.images].every((image) => image.complete && image.naturalWidth > 0)")
            lines = "return [...document.querySelectorAll('svg path.mean')].map((p) => p.getTotalLength() > 100)"
            assert browser.run(lines) == [True]
            assert browser.messages() == []
        light = browser.run("return getComputedStyle(document.body).backgroundColor")
        browser.theme("dark")
        assert browser.run("return getComputedStyle(document.body).backgroundColor") != light


# --- runs that did not go well -------------------------------------------------------------------------------------


def test_an_interrupted_run_has_a_page_so_far(base: BaseModel, rex: Subject, tmp_path: Path) -> None:
    def stop(step: Any) -> None:
        if step.index == 3:
            raise RuntimeError("by hand")

    config = replace(CONFIG, sample_every=None, checkpoint_every=2)
    with pytest.raises(RuntimeError, match="by hand"):
        train(base, rex, lora=LoraSpec(rank=2), config=config, out=tmp_path, on_step=stop, progress=False)
    text, parsed = page_of(tmp_path)
    said = " ".join(parsed.text["li"])
    assert "of 6 steps" in said and "again to continue" in said and "No samples were drawn" in said
    assert 'weight_name="checkpoints/000002/adapter.safetensors"' in "".join(parsed.text["pre"])
    train(base, rex, lora=LoraSpec(rank=2), config=config, out=tmp_path, progress=False)
    text, parsed = page_of(tmp_path)
    assert "Finished: 6 steps" in text and "continued at step 2" in text


def test_a_page_is_no_reason_to_lose_a_run(
    base: BaseModel, rex: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").mkdir()  # it cannot be replaced by a file
    (tmp_path / "crops").write_text("in the way")
    config = replace(CONFIG, steps=1, sample_every=None)
    adapter = train(base, rex, lora=LoraSpec(rank=2), config=config, out=tmp_path)
    assert adapter.modules and (tmp_path / "adapter.safetensors").is_file()
    assert "no report.html (" in capsys.readouterr().err


def test_torn_files_are_left_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "0000.webp").write_bytes(b"torn")
    (tmp_path / "samples" / "000001.png").write_bytes(b"torn")
    lines = [{"step": 1, "prompt": "p", "seed": 0, "file": "../samples/000001.png"}, {"step": 2, "file": "gone.png"}]
    lines += [{"step": 3, "file": "x" * 5000}, {"step": 4, "file": "a\0b"}, {"step": 5, "file": ".."}, {"step": 6}]
    (tmp_path / "samples" / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "fi')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 0.5, "rate": 0.1, "seconds": 1}\n{"step": 2, "loss": null}\n[]\n{"st'
    )
    (tmp_path / "scores.json").write_text("[]")
    for record in (
        {"status": None},
        {"events": [{}, 3], "facts": [], "step": "x", "peak_memory": {"host": "much"}, "seconds": {"a": None}},
    ):
        (tmp_path / "run.json").write_text(json.dumps(record))
        write_report(tmp_path)
        _, parsed = page_of(tmp_path)
        assert parsed.open == [] and [i["alt"] for i in parsed.all("img")] == [
            "step 1: cannot be read",
            "photo 1: cannot be read",
        ]
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(SettingsError, match="no readable run.json"):
        write_report(tmp_path)


@pytest.mark.parametrize("kind", ["link", "bomb", "gif", "pipe"])
def test_pictures_of_a_run_pass_the_checks_of_photos(kind: str, tmp_path: Path) -> None:
    """A run folder from somebody else shows nothing from outside it, and opens nothing that a photo could not be."""
    run, secret = tmp_path / "run", tmp_path / "secret.png"
    Image.new("RGB", (64, 64), (1, 2, 3)).save(secret)
    (run / "samples").mkdir(parents=True)
    (run / "crops").mkdir()
    (run / "run.json").write_text(json.dumps({"status": "finished"}))
    line = {"step": 1, "prompt": "p", "seed": 0, "file": "000001.png"}
    (run / "samples" / "samples.jsonl").write_text(json.dumps(line))
    for file in (run / "samples" / "000001.png", run / "crops" / "0000.webp"):
        if kind == "link":
            file.symlink_to(secret)
        elif kind == "bomb":
            file.write_bytes(declared_png(9000, 9000))
        elif kind == "gif":
            Image.new("RGB", (64, 64)).save(file, "GIF")
        elif file.suffix == ".webp":  # a pipe among the samples is no file, so it is not listed
            os.mkfifo(file)
    write_report(run)
    shown = page_of(run)[1].all("img")
    assert shown and all(image["alt"].endswith("cannot be read") for image in shown)
    assert all((pixels(image["src"]) == 128).all() for image in shown)
    found = samples_of(run, most=1)
    assert found is None if kind == "pipe" else found is not None and found.cells == ((None,),)
    assert isinstance(newest_samples(run), str)


HUGE = 10**400
RECORDS: dict[str, Any] = {
    "nothing": {"a": 1},
    "huge steps": {"status": "finished", "step": 10**12, "steps": 10**15, "facts": {"subjects": [{"photos": [{}]}]}},
    "negative": {"step": -5, "steps": -1, "seconds": {"training": -1e9, "preparing": -3}, "peak_memory": {"host": -1}},
    "other kinds": {"step": [], "steps": {}, "status": ["finished"], "events": {"a": 1}, "seconds": [3], "identity": {}},
    "odd facts": {"facts": {"config": [1], "lora": 3, "base": "x", "subjects": [{"photos": 5, "token": [], "class_noun": {}}]}},
    "odd settings": {
        "facts": {"config": {"batch_size": "many", "steps": {}, "flip": [], "resolution": {}}, "lora": {"rank": []}}
    },
    "events": {"events": [{"step": 1e300, "what": [1], "at": 5}, {"what": None}, {"step": 10**14, "what": "not finite"}]},
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_was_edited_has_a_page(kind: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RECORDS[kind]))
    values = [0.5, -3, 0, 1e300, HUGE, "0.5", None, True, [], 10**15, 1e-300]
    lines = [{"step": step, "loss": loss, "rate": loss, "seconds": loss} for loss in values for step in (*values, 3, 10**12)]
    samples = [{"step": value, "prompt": value, "seed": value, "file": value} for value in values]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) * 5 + '{"loss": NaN, "step": 1}')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    row = {"name": [], "step": 10**14, "scores": {"a": {"mean": 1e300, "low": "x"}}, "subject_share": 1e10, "overall": -1e300}
    scores = {
        "identity": RECORDS[kind].get("identity"),
        "metrics": [{}, 3],
        "adapters": [row, 5, {}],
        "advice": [1, {}],
        "photos": 3,
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    write_report(tmp_path)
    text, parsed = page_of(tmp_path)
    paths = re.findall(r'd="M([^"]*)"', text)
    assert parsed.open == [] and paths and not any("nan" in path or "inf" in path for path in paths)
    assert len(text) < 200_000


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"step": 1' + "0" * 400 + "}", '{"a": NaN}', "[]", "3", '{"a": 1, "a": 2}']
)
def test_a_record_that_is_not_one_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SettingsError, match="no readable run.json"):
        write_report(tmp_path)


def test_advice_follows_the_figures(tmp_path: Path) -> None:
    photos = [{"sha256": "x"}] * 3
    record = {
        "status": "finished",
        "step": 400,
        "steps": 400,
        "facts": {"config": {"batch_size": 4, "prior_loss_weight": 1.0}, "subjects": [{"photos": photos}]},
        "events": [{"what": "the loss was not finite 3 times in a row, at step 9: the learning rate is halved"}],
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    losses = [0.1] * 200 + [0.5] * 200
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": x}) + "\n" for i, x in enumerate(losses, 1)))
    said = " ".join(one.text for one in advice(read_run(tmp_path)))
    for words in (
        "not finite",
        "3 photos: a few more",
        "seen 533 times, which is many",
        "rose from 0.100 to 0.500",
        "No samples",
    ):
        assert words in said
    record |= {"step": 10, "steps": 10, "events": []}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").write_text("")
    said = " ".join(one.text for one in advice(read_run(tmp_path)))
    assert "seen 13 times, which is few" in said and "e.g. steps=20, which continues this run" in said
    assert "rose" not in said and "not finite" not in said


# --- charts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [1, 0.0031, 1500, 7, 1e-7])
def test_ticks_are_round_and_cover(high: float) -> None:
    found = ticks(high, 4)
    steps = np.diff(found)
    assert found[0] == 0 and found[-1] >= high > found[-2] and np.allclose(steps, steps[0]) and 3 <= len(found) <= 6
    assert round(steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9), 6) in (1, 2, 2.5, 5)


def test_long_lines_keep_their_spikes_and_the_mean_has_no_pull() -> None:
    points = [(float(i), 1.0) for i in range(1, 5001)]
    points[1234] = (1235.0, 9.0)
    few = thinned(points)
    assert len(few) <= MOST_POINTS + 2 and (1235.0, 9.0) in few and few == sorted(few)
    mean = smoothed(points)
    assert len(mean) == 5000 and mean[0][1] == mean[100][1] == pytest.approx(1.0) and mean[1234][1] > 1.02
    found = chart("label", [("raw", points)], top=2.0)
    assert found is not None and chart("nothing", [("raw", [])]) is None
    [path] = re.findall(r'class="raw" d="M([^"]+)"', found)
    heights = [float(pair.split()[1]) for pair in path.split("L")]
    assert len(heights) > 100 and min(heights) == TOP and max(heights) <= 240 - BOTTOM  # what is above the top ends at the edge
    said = chart(NASTY, [("raw", points)], marks=[(3, NASTY)])
    assert said is not None and "<script" not in said and said.count("&lt;script&gt;") == 2


# --- trackers ------------------------------------------------------------------------------------------------------


def test_a_tracker_hears_losses_rates_settings_and_samples(run: Path, heard: Heard) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in heard.values] == [1, 2, 3, 4, 5, 6] and heard.done
    for (_, values), line in zip(heard.values, lines, strict=True):
        assert values == {"loss": pytest.approx(line["loss"]), "learning_rate": pytest.approx(line["rate"])}
    assert heard.settings["steps"] == 6 and heard.settings["rank"] == 2 and heard.settings["base"] == "tiny<b>"
    assert all(isinstance(value, bool | int | float | str) for value in heard.settings.values())
    assert [(step, size) for step, _, size in heard.images] == [(step, (64, 64)) for step in (0, 0, 3, 3, 6, 6)]


def test_a_tracker_that_fails_is_left_out(base: BaseModel, rex: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = Heard(fail_at=2), Heard()
    config = replace(CONFIG, steps=3, sample_every=None)
    train(base, rex, lora=LoraSpec(rank=2), config=config, track=[bad, good])
    assert "tracker heard is no longer used: no way out" in capsys.readouterr().err
    assert len(good.values) == 3 and len(bad.values) == 1 and not bad.done


def test_trackers_that_cannot_be_had_are_refused_before_the_work(base: BaseModel, rex: Subject, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="track 'paper' is unknown; allowed: .*tensorboard"):
        train(base, rex, track="paper")
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(MissingExtraError, match=r"pip install 'lora-booth\[tensorboard\]'"):
            train(base, rex, track="tensorboard", out=tmp_path)
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(SettingsError, match="pip install wandb"):
            train(base, rex, track="wandb", out=tmp_path)


def test_tensorboard_reads_what_was_tracked(base: BaseModel, rex: Subject, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(SettingsError, match="pass out="):
        train(base, rex, track="tensorboard")
    train(base, rex, lora=LoraSpec(rank=2), config=CONFIG, out=tmp_path / "run", track="tensorboard", progress=False)
    found = EventAccumulator(str(tmp_path / "run" / "logs" / "run"))
    found.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, pytest.approx(e.value)) for e in found.Scalars("loss")] == [(n["step"], n["loss"]) for n in lines]
    assert len(found.Tags()["images"]) == 2

"""Scores: tiny real CLIP and ViT against a direct computation, the toybox's judge end to end, adapters of a run compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline, random_adapter, tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTModel

from lora_booth import cli
from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import Card
from lora_booth.base.base_model import TOYBOX_FOLDER, BaseModel
from lora_booth.cli.demo import write_photos
from lora_booth.config import LoraSpec
from lora_booth.errors import EvaluationError, SettingsError
from lora_booth.evaluation.encoders import FOR_CLIP, FOR_DINO, Clip, Dino
from lora_booth.evaluation.measures import TEMPLATE, ToyboxMeasure, cases_of, drawn_subject
from lora_booth.evaluation.protocol import Candidate, candidates_of, evaluate, is_toybox
from lora_booth.evaluation.results import CHANCE, Comparison, Metric, Row, score, scores_file
from lora_booth.photos.cropping import crop_photo
from lora_booth.photos.finding import find_photos
from lora_booth.pictures.composition import Composition
from lora_booth.subject.wording import without_subject
from lora_booth.toybox.judge import judge
from lora_booth.toybox.scenery import CONTEXTS
from lora_booth.toybox.world import HELD_OUT, Scene, draw, photos_of

SKS_DOG = Card(token="sks", class_noun="dog")


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("dino")
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**size, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    folder, words = tmp_path_factory.mktemp("clip"), tokenizer()
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {**size, **special, "vocab_size": len(words), "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def pictures(count: int, *, seed: int = 0, size: tuple[int, int] = (70, 50)) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    small = [Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize(size, Image.Resampling.BICUBIC) for image in small]


def unit(vectors: torch.Tensor) -> np.ndarray:
    return (vectors / vectors.norm(dim=1, keepdim=True)).detach().numpy()


# --- the encoders --------------------------------------------------------------------------------------------------


def test_pictures_are_prepared_as_clip_wants_them() -> None:
    images = [*pictures(2), *pictures(2, seed=1, size=(90, 133))]
    theirs = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    assert torch.allclose(FOR_CLIP.pixels(images, 32), expected, atol=1e-5)
    assert FOR_DINO.pixels(images, 224).shape == (4, 3, 224, 224)
    assert FOR_DINO.square(images[0].resize((512, 256)), 224).size == (224, 224)


def test_encoders_are_the_stock_models(dino: Path, clip: Path) -> None:
    images, texts = pictures(20), ["a photo of a dog", "dog"]  # more than go in at a time
    vit, both = ViTModel.from_pretrained(dino, add_pooling_layer=False).eval(), CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        states = vit(pixel_values=FOR_DINO.pixels(images, 32)).last_hidden_state[:, 0]
        out = both(
            pixel_values=FOR_CLIP.pixels(images, 32),
            **tokenizer()(texts, padding=True, truncation=True, max_length=16, return_tensors="pt"),
        )
    assert np.allclose(Dino(dino).of_images(images).numpy(), unit(states), atol=1e-5)
    encoder = Clip(clip)
    assert np.allclose(encoder.of_images(images).numpy(), out.image_embeds.numpy(), atol=1e-5)
    assert np.allclose(encoder.of_texts(texts).numpy(), out.text_embeds.numpy(), atol=1e-5)
    assert encoder.of_texts(["a dog " * 40]).shape == (1, 12)  # longer than it can read


def test_what_is_not_at_hand_is_named_with_the_way_to_get_it(tmp_path: Path, dino: Path, clip: Path) -> None:
    with pytest.raises(EvaluationError, match=r"DINO \(some-one/dino\) .*hf download some-one/dino"):
        Dino("some-one/dino")
    with pytest.raises(EvaluationError, match=r"CLIP .*check that the folder is complete"):
        Clip(tmp_path)
    with pytest.raises(EvaluationError, match="it is a clip; allowed: vit"):
        Dino(clip)
    with pytest.raises(EvaluationError, match="it is a vit; allowed: clip"):
        Clip(dino)


# --- prompts -------------------------------------------------------------------------------------------------------

BARE = {
    "a photo of sks dog": "a photo of a dog",
    "a photo of sks dog on the moon": "a photo of a dog on the moon",
    "a sks dog in the jungle": "a dog in the jungle",
    "a red sks dog": "a red dog",
    "sks dog, oil on canvas": "a dog, oil on canvas",
    "my SKS dog": "my dog",
    "sks asleep": "a dog asleep",
    "a sksy dog": "a sksy dog",
}


@pytest.mark.parametrize("prompt", BARE)
def test_a_prompt_without_its_token(prompt: str) -> None:
    assert without_subject(prompt, "sks", "dog") == BARE[prompt]


def test_cases_of_prompts_and_contexts() -> None:
    found = cases_of(SKS_DOG, ["a photo of {token} {class_noun} {context}", "my sks dog"], ["on the moon", "underwater"])
    assert [case.prompt_for(SKS_DOG) for case in found] == [
        *("a photo of sks dog on the moon", "a photo of sks dog underwater", "my sks dog"),
    ]
    assert [case.plain for case in found] == ["a photo of a dog on the moon", "a photo of a dog underwater", "my dog"]
    assert [case.context for case in found] == ["on the moon", "underwater", None]
    assert found[2].prompt_for(replace(SKS_DOG, token="zwx")) == "my zwx dog"
    for prompts, words in ((["a dog"], "does not name"), (["{token} {context}"], "no contexts")):
        with pytest.raises(SettingsError, match=words):
            cases_of(SKS_DOG, prompts)
    with pytest.raises(SettingsError, match="no token or class noun"):
        cases_of(Card(token="sks"), ["sks"])


# --- statistics ----------------------------------------------------------------------------------------------------


def test_intervals_are_over_prompts() -> None:
    random = np.random.default_rng(0)
    alike = [[x] * 50 for x in random.normal(0, 1, 12)]  # 50 pictures of a prompt tell no more than one
    found = score(alike)
    assert found is not None and found.count == 600 and found.mean == pytest.approx(np.mean([x[0] for x in alike]))
    error = np.std([x[0] for x in alike]) / 12**0.5
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    single = score([random.normal(0, 1, 400).tolist()])
    assert single is not None and single.high is not None and single.low is not None
    assert (single.high - single.low) / 2 == pytest.approx(1.96 / 20, rel=0.15)
    assert score([]) is None and score([[]]) is None
    lone = score([[0.5]])
    assert lone is not None and (lone.mean, lone.low, str(lone)) == (0.5, None, "0.500")
    uneven = score([[1.0], [0.0, 0.0, 0.0]])
    assert uneven is not None and uneven.mean == 0.25


def comparison(**subject: list[float]) -> Comparison:
    """Adapters with this subject fidelity for each of four prompts, and the base's prompt fidelity."""
    metrics = (Metric("dino", "DINO", of="subject"), Metric("clip_t", "CLIP-T", of="prompt"), Metric("pres", "PRES", "lower"))

    def row(name: str, values: list[float], text: float = 0.3, pres: float = 0.4) -> Row:
        scores = {"dino": [[v] for v in values], "clip_t": [[text]] * 4, "pres": [[pres]], CHANCE: [[0.2]] * 4}
        return Row(name, scores)

    return Comparison(
        metrics=metrics,
        adapters=tuple(row(name, values) for name, values in subject.items()),
        floor=row("base alone", [0.4] * 4),
        ceiling=Row("photos", {"dino": [[0.8, 0.8]], "pres": [[0.8, 0.8]]}),
        described="",
        photos=2,
        prompts=("a", "b", "c", "d"),
        seeds=1,
        class_prompt="a photo of a dog",
        class_pictures=1,
    )


def test_the_best_and_whether_it_is_clear() -> None:
    clear = comparison(weak=[0.5, 0.5, 0.52, 0.5], strong=[0.7, 0.72, 0.7, 0.7])
    assert clear.best.name == "strong" and clear.advice()[0] == "The best is strong, clearly ahead of weak."
    assert clear.standing(clear.best) == {
        "subject_share": pytest.approx(0.7625),
        "prompt_share": pytest.approx(1),
        "overall": pytest.approx(0.7625),
        "drift": 0.0,
    }
    lead = clear.lead
    assert lead is not None and lead[0].name == "weak" and lead[1] <= 0.7625 - 0.2625 <= lead[2]
    unclear = comparison(one=[0.5, 0.7, 0.5, 0.7], other=[0.7, 0.5, 0.7, 0.51])
    assert unclear.best.name == "other" and "not clearly" in unclear.advice()[0]
    alone = replace(clear, prompts=clear.prompts[:1])
    assert alone.advice()[0] == "The best is strong, by one prompt alone: pass more to be sure."
    strong = clear.best
    deaf = replace(clear, adapters=(replace(strong, values={**strong.values, "clip_t": [[0.22]] * 4}), clear.adapters[0]))
    assert deaf.best.name == "weak"  # who no longer follows prompts is not the best
    drifted = replace(clear, adapters=(replace(strong, values={**strong.values, "pres": [[0.7]]}),))
    assert drifted.standing(drifted.best)["drift"] == pytest.approx(0.75) and any(
        "plain class" in line for line in drifted.advice()
    )
    deaf_base = replace(clear, floor=replace(clear.floor, values={**clear.floor.values, CHANCE: [[0.3]] * 4}))
    standing = deaf_base.standing(strong)
    assert standing["prompt_share"] is None and standing["overall"] == clear.standing(strong)["subject_share"]
    assert any("base itself" in line for line in deaf_base.advice())
    flat = replace(clear, ceiling=Row("photos", {"dino": [[0.4]]}))
    assert flat.overall(strong) is None and "one subject" in flat.advice()[0]


@pytest.mark.parametrize("subject", [0.42, 0.55, 0.7])  # hardly, partly and well learnt
@pytest.mark.parametrize("sign", [{"clip_t": [[0.22]] * 4}, {"copies": [[0.5]] * 4}, {"pres": [[0.7]]}, {}])
def test_advice_never_asks_for_more_steps_and_fewer_at_once(subject: float, sign: dict[str, list[list[float]]]) -> None:
    plain = comparison(one=[subject] * 4)
    row = plain.adapters[0]
    said = " ".join(replace(plain, adapters=(replace(row, values={**row.values, **sign}),)).advice())
    more, fewer = any(words in said for words in ("train longer", ": more steps")), "fewer steps" in said
    assert not (more and fewer) and ("learnt well" in said) == (subject == 0.7)
    assert more == (not sign and subject < 0.7) and fewer == (bool(sign) and subject == 0.7)


# --- pictures of the world -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> BaseModel:
    return BaseModel.from_pipeline(make_pipeline("sd1"), name="tiny")


@pytest.mark.filterwarnings("ignore:the prompt does not name:lora_booth.errors.CompositionWarning")
@pytest.mark.slow
def test_the_protocol_is_as_written(tiny: BaseModel, photos: Path, dino: Path, clip: Path) -> None:
    """Every figure again by plain loops over the same pictures."""
    adapter = random_adapter(tiny, size=1.0)
    prompts = ["a photo of {token} {class_noun}", "a red {token} {class_noun} on a log"]
    settings: dict[str, Any] = {"steps": 2, "guidance": 1.0, "batch_size": 1}
    told: list[tuple[int, int]] = []
    options = {"dino": dino, "clip": clip, "on_progress": lambda *done: told.append(done), **settings}
    made = evaluate(tiny, adapter, photos, prompts=prompts, seeds=[3, 4], class_seeds=[0, 1, 2], **options)
    assert told[-1] == (14, 14) and [done for done, _ in told] == list(range(1, 15))

    squares = [crop_photo(photo, [(512, 512)]).image for photo in find_photos(photos).photos]
    eye, reader = Dino(dino), Clip(clip)
    see: Callable[[Any], np.ndarray] = lambda images: eye.of_images(images).numpy()  # noqa: E731
    look: Callable[[Any], np.ndarray] = lambda images: reader.of_images(images).numpy()  # noqa: E731

    def drawn(adapters: list[Any], prompt: str, seeds: list[int]) -> list[Image.Image]:
        return [p.image for p in Composition(tiny, adapters).generate(prompt, seeds=seeds, **settings)]

    bares = ["a photo of a dog", "a red dog on a log"]
    for row, adapters, texts in (
        (made.adapters[0], [(adapter, 1.0)], ["a photo of sks dog", "a red sks dog on a log"]),
        (made.floor, [], bares),
    ):
        groups = [drawn(adapters, text, [3, 4]) for text in texts]
        plain = drawn(adapters, "a photo of a dog", [0, 1, 2])
        everything = [image for group in groups for image in group]
        dinos = [a @ b for a in see(everything) for b in see(squares)]
        clips = [a @ b for a in look(everything) for b in look(squares)]
        words = [a @ t for group, t in zip(groups, reader.of_texts(bares).numpy(), strict=True) for a in look(group)]
        between = max(a @ b for a, b in combinations(see(squares), 2))
        expected = {
            "dino": np.mean(dinos),
            "clip_i": np.mean(clips),
            "clip_t": np.mean(words),
            "pres": np.mean([a @ b for a in see(plain) for b in see(squares)]),
            "div": np.mean([1 - see(group)[0] @ see(group)[1] for group in groups]),
            "copies": np.mean([max(a @ b for b in see(squares)) > between for a in see(everything)]),
        }
        for key, value in expected.items():
            assert row.mean(key) == pytest.approx(value, abs=1e-5), (row.name, key)
        assert [p.prompt for p in row.pictures] == [text for text in texts for _ in range(2)]
    pairs = [a @ b for a, b in combinations(see(squares), 2)]
    assert made.ceiling.mean("dino") == pytest.approx(np.mean(pairs), abs=1e-5)
    assert made.adapters[0].digest == adapter.digest() and made.prompts == ("a photo of sks dog", "a red sks dog on a log")
    assert str(dino) in made.described and "not LPIPS" in made.described
    assert json.loads(json.dumps(made.as_dict()))["adapters"][0]["scores"]["dino"]["count"] == 4


def test_what_cannot_be_scored_together(tiny: BaseModel, photos: Path) -> None:
    dog = random_adapter(tiny)
    with pytest.raises(EvaluationError, match="2 classes"):
        evaluate(tiny, [dog, dog.with_card(class_noun="owl")], photos)
    with pytest.raises(EvaluationError, match="at least 2"):
        evaluate(tiny, dog, pictures(1))
    with pytest.raises(SettingsError, match="no seeds"):
        evaluate(tiny, dog, photos, seeds=[])
    with pytest.raises(EvaluationError, match="facebook/dino-vits16.*hf download facebook/dino-vits16"):
        evaluate(tiny, dog, photos)


# --- the drawn world -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olga", "brew", "bolt"])
def test_photos_of_the_drawn_world_are_recognised(name: str) -> None:
    images = photos_of(HELD_OUT[name], 5, CONTEXTS[:3], seed=500)
    assert drawn_subject(images) == (name, HELD_OUT[name])
    assert drawn_subject(pictures(4)) is None


def test_the_judges_figures_are_as_written() -> None:
    def renders(name: str, context: str, count: int) -> list[Image.Image]:
        return [draw(Scene((HELD_OUT[name],), context, "photo", 40 + seed)) for seed in range(count)]

    photos = photos_of(HELD_OUT["olga"], 4, CONTEXTS[:3], seed=500, size=64)
    measure = ToyboxMeasure(photos)
    cases = cases_of(Card(token="sks", class_noun="owl"), [TEMPLATE], ["in the jungle", "on a stage"])
    drawn = [renders("olga", "in the jungle", 2), [photos[0], *renders("brew", "on a stage", 1)]]
    found = measure.of_subject(cases, drawn)
    assert found["context"] == [[1, 1], [0, 1]] and found[CHANCE] == [[0, 0], [0, 0]]  # photos[0] is on the moon
    assert found["identity"][0] == [1, 1] and found["code"] == [[1, 1], [1, 0]] and found["identity"][1][1] < 0.7
    assert found["copies"] == [[0, 0], [1, 0]]
    of_class = [*renders("olga", "in the city", 1), *renders("brew", "in the city", 1)]
    a, b = (verdict.feature for verdict in judge(of_class))
    other = measure.of_class(of_class)
    assert other["pres"] == [[1, 0]] and other["class_div"] == [[pytest.approx(1 - a @ b)]]
    ceiling = measure.of_photos(cases, 3)
    assert [len(group) for group in ceiling["identity"]] == [3, 3] and np.mean(ceiling["identity"]) > 0.9
    assert np.mean(ceiling["context"]) == np.mean(ceiling["pres"]) == 1 and np.mean(ceiling["copies"]) == 0


@pytest.fixture(scope="module")
def toybox() -> BaseModel:
    return BaseModel.load("toybox")


def test_the_judge_is_chosen_by_the_weights_not_by_a_name(toybox: BaseModel, tmp_path: Path) -> None:
    make_pipeline("sd1").save_pretrained(tmp_path / "toybox")
    other = BaseModel.load(tmp_path / "toybox", device="cpu")
    assert other.name == "toybox" == toybox.name and other.rare_tokens == ()
    assert is_toybox(toybox) and not is_toybox(other)
    copied = tmp_path / "a copy"
    shutil.copytree(TOYBOX_FOLDER, copied)
    copy = BaseModel.load(copied, device="cpu", dtype=torch.bfloat16)
    assert copy.name == "a copy" and copy.rare_tokens == toybox.rare_tokens != () and is_toybox(copy)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toybox: BaseModel) -> Path:
    """photos/rex, rex.safetensors, and a folder of a run with three adapters."""
    write_photos("rex", tmp_path / "photos" / "rex", count=3)
    monkeypatch.chdir(tmp_path)
    adapter = replace(random_adapter(toybox, LoraSpec(rank=2), size=0.05))
    adapter.save("rex.safetensors")
    for step, size in ((10, 0.02), (20, 0.05)):
        other = random_adapter(toybox, LoraSpec(rank=2), size=size)
        other.save(Path("run") / "samples" / f"{step:06d}.safetensors")
    adapter.save(Path("run") / "checkpoints" / "000030" / "adapter.safetensors")
    (Path("run") / "run.json").write_text(json.dumps({"status": "running", "step": 34, "steps": 40, "identity": "x"}))
    return tmp_path


def run_cli(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    return int(left.value.code or 0)


FEW = ("--seeds", "0", "--class-seeds", "0-1", "--steps", "1", "--context", "on the moon", "--context", "in the snow")


@pytest.mark.slow
def test_evaluate_on_the_command_line(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_cli(
            "evaluate", "rex.safetensors:0.5", "--photos", "photos/rex", *FEW, "--size", "48x64", "--json", "--out", "scored"
        )
        == 0
    )
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "the subject is rex" in found["measured_with"] and found["best"] == "rex"
    assert found["settings"]["size"] == "48x64"
    assert found["prompts"] == ["a photo of sks dog on the moon", "a photo of sks dog in the snow"]
    keys = {"identity", "code", "cosine", "context", "pres", "div", "class_div", "copies"}
    assert {m["key"] for m in found["metrics"]} == keys
    assert 0 <= found["adapters"][0]["scores"]["identity"]["mean"] <= 1 == found["photos"]["scores"]["identity"]["count"] / 2
    assert found["photos"]["scores"]["identity"]["mean"] > 0.8
    assert json.loads((desk / "scored" / "scores.json").read_text()) == found and (desk / "scored" / "gallery.html").is_file()
    assert "picture 8/8" in said.err


@pytest.mark.slow
def test_the_adapters_of_a_run(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [(c.name, c.step) for c in candidates_of("run")] == [("step 10", 10), ("step 20", 20), ("step 30", 30)]
    assert run_cli("evaluate", "run", "--photos", "photos/rex", *FEW) == 0
    said = capsys.readouterr().out
    assert "The best is step" in said and "\nbase alone" in said and "wrote run/report.html" in said.replace("\\", "/")
    scores = json.loads((desk / "run" / "scores.json").read_text())
    assert scores["identity"] == "x" and [row["step"] for row in scores["adapters"]] == [10, 20, 30]
    (desk / "empty").mkdir()
    (desk / "empty" / "run.json").write_text("{}")
    assert run_cli("evaluate", "empty", "--photos", "photos/rex") == 2
    assert "no adapter in this run's folder" in capsys.readouterr().err


@pytest.mark.slow
def test_unknown_subjects_of_the_toybox_are_measured_by_features(toybox: BaseModel, tmp_path: Path) -> None:
    adapter = random_adapter(toybox, LoraSpec(rank=2), size=0.05)
    prompts = ["a photo of {token} {class_noun}", "a photo of {token} {class_noun} underwater"]
    both = [Candidate(adapter, weight=0.5), Candidate(adapter)]
    made = evaluate(toybox, both, pictures(3), prompts=prompts, seeds=[0], class_seeds=[0], steps=1)
    assert [row.name for row in made.adapters] == ["sks", "sks #2"] and "features in place of DINO" in made.described
    assert {m.key: m.of for m in made.metrics}["cosine"] == "subject"
    count = made.adapters[0].score("context")
    assert count is not None and count.count == 1  # of the prompt that names a context
    assert scores_file(tmp_path, made).is_file()


@pytest.mark.slow
def test_adapters_without_words_of_their_own_need_them(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Adapter.load("rex.safetensors").with_card(token=None, class_noun=None, title="rex").save("plain.safetensors")
    words = ("evaluate", "plain.safetensors", "--photos", "photos/rex", *FEW)
    assert run_cli(*words) == 2 and "--token" in capsys.readouterr().err
    assert run_cli(*words, "--token", "sks", "--class-noun", "dog") == 0

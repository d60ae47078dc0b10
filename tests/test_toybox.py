"""The drawn world, its judge, and the way the embedded base was made from them."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from lora_booth.base.base_model import TOYBOX_FOLDER, BaseModel
from lora_booth.base.diffusers_folder import declared_rare_tokens
from lora_booth.subject.tokens import check_token, propose_tokens
from lora_booth.toybox import world
from lora_booth.toybox.judge import OBJECT_HEADS, SCENE_HEADS, JudgeNet, judge, read
from lora_booth.toybox.scenery import CONTEXTS
from lora_booth.toybox.world import CLASSES, COLORS, HELD_OUT, STYLES, Identity, Scene, draw
from tools.toybox import __main__ as build
from tools.toybox import judge as judge_stage
from tools.toybox import pictures, scenes, stages, text, unet, vae
from tools.toybox.judge import judge_loss, labels, worn
from tools.toybox.scenes import caption, random_scene

ROOT = Path(__file__).parent.parent

RARE_TOKENS = declared_rare_tokens(TOYBOX_FOLDER)


def fingerprint(seeds: range) -> str:
    digest = hashlib.sha256()
    for seed in seeds:
        scene = random_scene(seed)
        digest.update(draw(scene).tobytes())
        digest.update(caption(scene).encode())
    return digest.hexdigest()


# --- the world -----------------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_bytes_in_a_new_process_too():
    here = fingerprint(range(6))
    assert here == fingerprint(range(6)) != fingerprint(range(6, 12))
    code = f"""import hashlib, sys
sys.path.insert(0, {str(ROOT)!r})
from lora_booth.toybox.world import draw
from tools.toybox.scenes import caption, random_scene
{inspect.getsource(fingerprint)}
print(fingerprint(range(6)), *[name for name in ("torch", "diffusers") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [here], done.stderr  # and the world alone needs no torch


def test_there_is_something_to_learn():
    assert len(CLASSES) >= 8 and len(COLORS) >= 10 and len(CONTEXTS) >= 9 and len(STYLES) >= 2
    assert set(world.SCENERY) == set(CONTEXTS)


@pytest.mark.parametrize("size", [16, 64, 100, 256])
def test_any_size_can_be_drawn(size):
    image = draw(random_scene(4), size)
    assert image.mode == "RGB" and image.size == (size, size)


def painted(scene: Scene, size: int) -> np.ndarray:
    """(size, size) bool: where the picture differs from its scenery alone, as `draw` paints it first."""
    canvas = world.Canvas(size * world.SUPERSAMPLING)
    world.SCENERY[scene.context](canvas, random.Random(f"picture {scene.seed}"))
    empty = canvas.image.resize((size, size), Image.Resampling.BOX)
    return np.abs(np.asarray(draw(scene, size)).astype(int) - np.asarray(empty)).max(-1) > 24


@pytest.mark.parametrize("name", list(HELD_OUT))
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_context_can_hold_every_held_out_subject(name, context):
    assert 0.12 < painted(Scene((HELD_OUT[name],), context, "photo", 3), 32).mean() < 0.7  # of the picture


@pytest.mark.parametrize("class_noun", CLASSES)
def test_an_object_stands_in_the_middle(class_noun):
    identity = scenes.random_identity(random.Random(class_noun), class_noun)
    for seed, context in enumerate(("on the moon", "on the beach", "in the kitchen")):
        where = painted(Scene((identity,), context, "photo", seed), 96)
        assert 0.1 < where.mean() < 0.6
        assert abs((where.sum(0) * np.arange(96)).sum() / where.sum() - 48) < 16  # a sixth of the side


def test_two_objects_stand_side_by_side():
    pair = next(scene for scene in map(random_scene, range(50)) if len(scene.objects) == 2)
    halves = np.split(painted(pair, 64), 2, axis=1)
    assert all(0.15 < half.mean() < 0.7 for half in halves)


def test_a_caption_tells_what_it_is_asked_to():
    hidden = {*scenes.PATTERN_WORDS.values(), *scenes.ACCESSORY_WORDS.values()}
    for seed in range(1000):
        scene = random_scene(seed)
        words = caption(scene).split()
        assert [word for word in words if word in COLORS] == [o.color for o in scene.objects]
        assert [word for word in words if word in CLASSES] == [o.class_noun for o in scene.objects]
        assert not set(words) & (hidden | set(RARE_TOKENS))
        assert caption(scene).endswith(scene.context)
        bare = caption(scene, [()] * 2, context=False)
        assert not set(bare.split()) & (hidden | set(COLORS)) and scene.context not in bare


def test_a_full_description_belongs_to_one_look_only():
    identities = [scenes.random_identity(random.Random(seed)) for seed in range(3000)]
    phrases = {scenes.phrase(identity, scenes.DETAILS): identity for identity in identities}
    assert len(phrases) == len(set(identities))
    assert scenes.phrase(HELD_OUT["rex"], scenes.DETAILS) == "a red flagged white spotted brown dog"
    assert scenes.phrase(HELD_OUT["brew"], scenes.DETAILS) == "a plain blue dipped pink mug"
    assert scenes.phrase(HELD_OUT["olga"], ["pattern"]) == "a white bellied owl"


def test_an_owl_has_its_article():
    assert caption(Scene((HELD_OUT["olga"],), CONTEXTS[0]), [()], context=False) == "a photo of an owl"
    assert caption(Scene((HELD_OUT["finn"],), CONTEXTS[0]), context=False) == "a photo of an orange fish"


@pytest.mark.slow
def test_held_out_subjects_are_never_in_a_training_scene():
    twins = {(h.class_noun, h.color, h.second, h.pattern) for h in HELD_OUT.values()}
    objects = [o for renders in (pictures.PLAIN, pictures.NAMED) for scene in renders.scenes() for o in scene.objects]
    assert len(objects) > 90_000
    assert not twins & {(o.class_noun, o.color, o.second, o.pattern) for o in objects}


def test_a_name_stands_for_one_look_that_no_held_out_subject_has():
    looks = scenes.named_looks()
    assert len(set(looks.values())) == len(looks) == scenes.NAMES
    assert not {(h.color, h.second, h.pattern) for h in HELD_OUT.values()} & {(k[0], k[1], k[3]) for k in looks.values()}
    words = {w for c in CONTEXTS for w in c.split()} | set(CLASSES) | set(COLORS) | set(STYLES) | set(RARE_TOKENS)
    assert not words & set(looks)
    assert all(scenes.name_of(held_out) is None for held_out in HELD_OUT.values())
    name, look = next(iter(looks.items()))
    pair = Scene((Identity("dog", *look), HELD_OUT["olga"]), CONTEXTS[0])
    assert caption(pair, [("name",), ("color",)]) == f"a photo of {name} dog and a blue owl {CONTEXTS[0]}"
    assert name not in caption(pair)  # only where it is asked for


def test_most_named_scenes_have_names_and_plain_ones_none_but_by_chance():
    named = [o for s in replace(pictures.NAMED, count=500).scenes() for o in s.objects]
    plain = [o for s in replace(pictures.PLAIN, count=500).scenes() for o in s.objects]
    assert 0.75 < np.mean([scenes.name_of(o) is not None for o in named]) < 0.85
    assert np.mean([scenes.name_of(o) is not None for o in plain]) < 0.1


def test_the_text_encoder_learns_what_a_caption_states():
    look = next(iter(scenes.named_looks().values()))
    scene = Scene((Identity("dog", *look), HELD_OUT["olga"]), CONTEXTS[1])
    everything = dict(zip([*HEADS, *SCENE_HEADS], labels(scene), strict=True))

    def stated(*told: tuple[str, ...], context: bool = False) -> set[object]:
        answers = text.stated(scene, text.Wording(told, context))
        known = {head: a for head, a in zip(everything, answers, strict=True) if a != -100}
        assert known.items() <= everything.items()
        return set(known)

    whole = {(0, name) for name in OBJECT_HEADS}
    nouns = {(0, "class_noun"), (1, "class_noun"), "style"}
    assert stated((), ()) == nouns
    assert stated(("name",), ()) == nouns | whole  # called by name
    assert stated(("color",), ("accessory",)) == nouns | {(0, "color"), (1, "accessory"), (1, "third")}
    assert stated(("pattern", "color"), (), context=True) == nouns | {(0, "second"), (0, "pattern"), (0, "color"), "context"}
    assert stated(scenes.DETAILS, ()) == nouns | whole


def test_the_text_stage_reads_each_object_at_its_own_noun(tokenizer):
    torch.manual_seed(0)
    nouns = text.token_ids(tokenizer, CLASSES)[:, 1]
    reader = text.TextReader(text.new_text_encoder(tokenizer), nouns).eval()
    prompts = ["a photo of a red dog and a blue owl on the moon", "a photo of a mug"]
    targets = torch.arange(2 * (2 * len(OBJECT_HEADS) + len(SCENE_HEADS))).reshape(2, -1)
    states, answers = reader(text.token_ids(tokenizer, prompts), targets)
    assert torch.equal(states, reader.text_encoder(text.token_ids(tokenizer, prompts)).last_hidden_state)
    first, second = answers[0], answers[len(OBJECT_HEADS)]
    head = reader.object_heads["class_noun"]
    assert torch.allclose(first[0], text.read(head, states[[0, 1], [6, 5]]), atol=1e-5)  # dog, mug
    assert torch.allclose(second[0], text.read(head, states[[0], [10]]), atol=1e-5)  # owl
    assert first[1].tolist() == targets[:, 0].tolist() and second[1].tolist() == [targets[0, len(OBJECT_HEADS)].item()]
    assert answers[-1][1].tolist() == targets[:, -1].tolist()


def test_held_out_finds_a_subject_and_its_near_twins():
    rng = random.Random(0)
    found = sum(scenes.is_held_out(scenes.random_identity(rng)) for _ in range(20_000))
    assert found > 0  # so the filter of random_scene has work to do
    for subject in HELD_OUT.values():
        assert scenes.is_held_out(subject)
        assert scenes.is_held_out(replace(subject, accessory="none", third="none"))
        other = next(c for c in COLORS if c not in (subject.color, subject.second))
        assert not scenes.is_held_out(replace(subject, color=other))


def test_photos_of_a_subject_are_in_the_contexts_in_turn():
    images = world.photos_of(HELD_OUT["rex"], 3, CONTEXTS[:2], seed=9, size=128)
    assert [v.context for v in judge(images)] == [CONTEXTS[0], CONTEXTS[1], CONTEXTS[0]]
    assert len({image.tobytes() for image in images}) == 3
    assert all(image.size == (128, 128) for image in images)


def test_a_scene_has_one_or_two_objects():
    with pytest.raises(ValueError, match="one or two objects, not 3"):
        draw(Scene((HELD_OUT["rex"],) * 3, CONTEXTS[0]))


# --- the judge -----------------------------------------------------------------------------------------------------

HEADS = [(slot, name) for slot in range(2) for name in OBJECT_HEADS]


def test_labels_say_what_is_drawn_and_can_be_read_back():
    for seed in range(300):
        scene = random_scene(seed)
        targets = labels(scene)
        assert len(targets) == 2 * len(OBJECT_HEADS) + len(SCENE_HEADS)
        sizes = [len(OBJECT_HEADS[name]) for _, name in HEADS] + [len(values) for values in SCENE_HEADS.values()]
        assert all(t == -100 or 0 <= t < size for t, size in zip(targets, sizes, strict=True))
        verdict = read([max(0, t) for t in targets], np.zeros(1))
        assert (verdict.objects, verdict.context, verdict.style) == (scene.objects, scene.context, scene.style)


def test_an_absent_object_has_no_attributes_to_learn():
    targets = labels(Scene((HELD_OUT["brew"],), CONTEXTS[0]))
    second = dict(zip(OBJECT_HEADS, targets[len(OBJECT_HEADS) :], strict=False))
    assert OBJECT_HEADS["class_noun"][second.pop("class_noun")] == "none"
    assert set(second.values()) == {-100}
    assert OBJECT_HEADS["third"][targets[list(OBJECT_HEADS).index("third")]] == "none"


def test_judge_net_sizes_and_loss():
    net = JudgeNet()
    drawn = [random_scene(seed) for seed in range(3)]
    logits, feature = net(torch.zeros(3, 3, 64, 64))
    assert [tuple(head.shape) for head in logits][-1] == (3, len(STYLES))
    assert feature.shape == (3, JudgeNet.FEATURES)
    targets = torch.tensor([labels(scene) for scene in drawn])
    assert judge_loss(net, torch.zeros(3, 3, 64, 64), targets).isfinite()
    alone = torch.tensor([labels(Scene((HELD_OUT["brew"],), CONTEXTS[0]))] * 3)
    assert judge_loss(net, torch.zeros(3, 3, 64, 64), alone).isfinite()  # no second object in the whole batch
    verdicts = judge([draw(scene, size) for scene, size in zip(drawn, (64, 64, 128), strict=True)], net)
    assert len(verdicts) == 3 and all(abs(np.linalg.norm(v.feature) - 1) < 1e-5 for v in verdicts)
    assert judge([], net) == []


def test_worn_renders_are_the_same_scenes_by_the_same_generator():
    x = torch.from_numpy(np.stack([np.asarray(draw(random_scene(seed))) for seed in range(4)])).permute(0, 3, 1, 2) / 127.5 - 1
    one, again, other = (worn(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one.shape == x.shape and torch.equal(one, again) and not torch.equal(one, other)
    assert all(0.02 < (a - b).abs().mean() < 0.5 for a, b in zip(one, x, strict=True))


def test_the_judge_reads_what_moved_or_is_in_other_light():
    """With the judge that had learnt from renders as they are, .63 of those that moved."""
    drawn = [Scene((who,), CONTEXTS[i % len(CONTEXTS)], "photo", 7000 + i) for i, who in enumerate([*HELD_OUT.values()] * 2)]
    plain = [draw(scene) for scene in drawn]
    for change in (lambda image: ImageChops.offset(image, 3, 3), lambda image: image.point(lambda value: int(value * 0.88))):
        verdicts = judge([change(image) for image in plain])
        assert sum(verdict.objects == scene.objects for verdict, scene in zip(verdicts, drawn, strict=True)) >= 0.85 * len(
            drawn
        )


def test_the_judge_reads_an_object_by_more_than_one_part():
    """Pairs with a patch of another picture in the middle of each: .79 of their classes, .54 by the judge before."""
    subjects = list(HELD_OUT.values())
    pairs = list(zip(subjects, [*subjects[1:], subjects[0]], strict=True))
    images = [draw(Scene(pair, context, "photo", i)) for i, pair in enumerate(pairs) for context in CONTEXTS[:4]]
    for i, image in enumerate(images):
        for left in (11, 41):
            box = (left, 37, left + 10, 47)
            image.paste(images[(i + 17) % len(images)].crop(box), box)
    found = [[seen.class_noun for seen in verdict.objects] for verdict in judge(images)]
    wanted = [[one.class_noun for one in pair] for pair in pairs for _ in CONTEXTS[:4]]
    assert np.mean([a == b for a, b in zip(found, wanted, strict=True)]) >= 0.7


def test_the_judge_reads_the_fields_of_an_identity():
    assert tuple(Identity.__dataclass_fields__) == tuple(OBJECT_HEADS)


# --- the tokenizer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return text.new_tokenizer()


def test_every_word_of_a_caption_is_one_token(tokenizer):
    for seed in range(200):
        words = caption(random_scene(seed), [scenes.DETAILS] * 2)
        ids = tokenizer(words).input_ids
        assert len(ids) == len(words.split()) + 2 <= text.MAX_TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == words


def test_rare_tokens_are_one_token_that_no_caption_has(tokenizer):
    for token in RARE_TOKENS:
        assert tokenizer.tokenize(token) == [f"{token}</w>"]
    ids = {tokenizer(token).input_ids[1] for token in RARE_TOKENS}
    assert len(ids) == len(RARE_TOKENS)
    every_word = {word for c in CONTEXTS for word in c.split()} | set(CLASSES) | set(COLORS) | set(STYLES)
    every_word |= {*scenes.named_looks(), *scenes.PATTERN_WORDS.values(), *scenes.ACCESSORY_WORDS.values()}
    assert not ids & {i for word in every_word for i in tokenizer(word).input_ids}


def test_any_text_can_be_read(tokenizer):
    ids = tokenizer("Größe 42, naïve; 犬!").input_ids
    assert tokenizer.unk_token_id is None or ids.count(tokenizer.unk_token_id) <= 1  # only the end of the text
    assert tokenizer("A Photo of SKS Dog").input_ids == tokenizer("a photo of sks dog").input_ids


def test_the_tokenizer_is_the_same_every_time(tokenizer):
    assert text.new_tokenizer().get_vocab() == tokenizer.get_vocab()


# --- building the base ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_build(monkeypatch):
    """The real build with a handful of pictures and steps."""
    for name in ("PLAIN", "NAMED", "HELD_OUT"):
        monkeypatch.setattr(pictures, name, replace(getattr(pictures, name), count=12))
    for module, name in ((vae, "VAE_STAGE"), (judge_stage, "JUDGE_STAGE"), (text, "TEXT_STAGE"), (unet, "UNET_STAGE")):
        monkeypatch.setattr(module, name, replace(getattr(module, name), steps=3, batch=2))
    monkeypatch.setattr(text, "CANDIDATES", 5)
    torch.manual_seed(0)


def tensors_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.fixture
def built(tiny_build, tmp_path) -> Path:
    build.build(tmp_path / "work", tmp_path / "model", torch.device("cpu"))
    return tmp_path / "model"


@pytest.mark.slow
def test_a_build_exports_what_the_stock_pipeline_loads_and_resumes_exactly(built, tmp_path, monkeypatch, capsys):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(built)  # as anyone would
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a photo of a red dog on the moon", num_inference_steps=1, generator=generator).images[0]
    assert image.size == (64, 64)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert BaseModel.load(built).family.name == "sd1"

    # the same again, stopped by the user at the third step of every stage
    stopped: list[str] = []
    real_save = stages.save

    clock = itertools.count(step=1000)  # seconds: run_stage saves when two minutes have passed
    monkeypatch.setattr(stages, "time", SimpleNamespace(time=lambda: next(clock)))

    def save_and_stop(state, path):
        real_save(state, path)
        if path.name.endswith(".state.pt") and state["step"] == 2 and path.name not in stopped:
            stopped.append(path.name)
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "save", save_and_stop)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            build.build(tmp_path / "work2", tmp_path / "model2", torch.device("cpu"))
    log = build.build(tmp_path / "work2", tmp_path / "model2", torch.device("cpu"))
    assert stopped == ["vae.state.pt", "judge.state.pt", "text.state.pt", "unet.state.pt"]
    assert not list((tmp_path / "work2").glob("*.state.pt"))
    assert tensors_of(tmp_path / "model2") == tensors_of(built)
    assert set(log) >= {"vae", "judge", "text", "unet"} and log == json.loads((tmp_path / "work2" / "log.json").read_text())


# --- the base that is shipped --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Path:
    assert (TOYBOX_FOLDER / "model_index.json").is_file(), "python -m tools.toybox --work DIR makes it"
    return TOYBOX_FOLDER


def test_the_shipped_folder_is_small_and_safe(model):
    files = [path for path in model.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6  # bytes
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md"}


def test_the_shipped_base_has_a_tokenizer_of_this_world(model, tokenizer):
    base = BaseModel.load("toybox")
    assert base.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert base.resolution == pictures.SIZE and base.prediction_type == unet.PREDICTION


JUDGE_FLOOR = {  # accuracy on held-out renders, 0.04 below the figures in benchmarks/toybox_build.json
    **dict.fromkeys(OBJECT_HEADS, 0.95),
    **dict.fromkeys(SCENE_HEADS, 0.96),
}


def test_no_rare_token_is_inert():
    base = BaseModel.load("toybox", device="cpu")
    read = {"known_rare": RARE_TOKENS, "encode": base.encode_text}
    assert all(check_token(token, base.tokenizer, **read).ok for token in RARE_TOKENS)
    table = base.pipeline.text_encoder.get_input_embeddings().weight.data
    article, sks = base.tokenizer.convert_tokens_to_ids(["a</w>", "sks</w>"])
    table[sks] = table[article] + 0.3 * (table[sks] - table[article])  # as if hardly trained
    assert set(propose_tokens(base.tokenizer, **read)) == set(RARE_TOKENS) - {"sks"}
    [problem] = check_token("sks", base.tokenizer, **read).problems
    assert "says next to nothing to the text encoder" in problem and "pass another token, e.g. " in problem
    assert check_token("sks", base.tokenizer, prompt="a photo of a sks owl", class_noun="owl", **read).ok
    assert check_token("sks", base.tokenizer, known_rare=RARE_TOKENS).ok  # by the vocabulary alone


def test_the_judge_reads_held_out_renders(model):
    scenes = [random_scene(20_000_000 + seed, pair_share=0.0) for seed in range(200)]
    pairs = list(zip(judge([draw(scene) for scene in scenes]), scenes, strict=True))
    for part in OBJECT_HEADS:
        right = [v.objects[:1] and getattr(v.objects[0], part) == getattr(s.objects[0], part) for v, s in pairs]
        assert np.mean([bool(r) for r in right]) >= JUDGE_FLOOR[part], part
    assert np.mean([v.context == s.context for v, s in pairs]) >= JUDGE_FLOOR["context"]
    assert np.mean([v.style == s.style for v, s in pairs]) >= JUDGE_FLOOR["style"]


@pytest.mark.slow
def test_the_shipped_base_draws_what_is_asked(model):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    prompts = ["a photo of a red dog on the moon"] * 8
    images = pipeline(prompts, num_inference_steps=12, guidance_scale=4.0, generator=generators).images
    verdicts = judge(images)
    assert sum(v.context == "on the moon" for v in verdicts) >= 6
    assert sum(bool(v.objects) and v.objects[0].class_noun == "dog" for v in verdicts) >= 5
    assert sum(bool(v.objects) and v.objects[0].color == "red" for v in verdicts) >= 5

"""A training that begins with an adapter, own class images, and a learning rate of its own for text encoders."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import base_of, random_adapter

from lora_booth.adapters.adapter import Adapter
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import AdapterBaseMismatch, SettingsError, SubjectError, TrainingError
from lora_booth.injection.trainable import first_factors, spec_of, trainable
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training.class_images import class_images
from lora_booth.training.encoding import prepare
from lora_booth.training.progress import Step
from lora_booth.training.training_run import training_steps

LORA = LoraSpec(rank=2)
TEXT_TOO = LoraSpec(rank=2, text_encoder=True)
CONFIG = TrainingConfig(steps=4, prior_loss_weight=0.0, warmup_steps=0, checkpoint_every=1)


class Interrupted(Exception):
    pass


def run(kind: str, subject: Subject, config: TrainingConfig = CONFIG, **options: Any) -> Adapter:
    return train(base_of(kind), subject, config=config, progress=False, **options)


def values(adapter: Adapter) -> torch.Tensor:
    return torch.cat([adapter.modules[key].delta().flatten() for key in sorted(adapter.modules)])


# --- beginning with an adapter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "has", "given"),
    [
        ("sd1", LoraSpec(rank=3, alpha=1.5), None),
        ("sd1", LoraSpec(rank=2, target_modules=("to_q", "conv1", "proj_in")), None),
        ("sd1", LoraSpec(rank=2, alpha=8.0), LoraSpec(rank=4, alpha=2.0)),
        ("sdxl", LoraSpec(rank=2, text_encoder=True), None),
    ],
)
def test_before_its_first_update_it_draws_as_the_adapter(kind: str, has: LoraSpec, given: LoraSpec | None) -> None:
    base = base_of(kind)
    adapter = random_adapter(base, has)
    lora = given or spec_of(base, adapter)
    assert given or (lora.rank, lora.scale_alpha, lora.text_encoder) == (has.rank, has.scale_alpha, has.text_encoder)
    with trainable(base, lora, first=first_factors(base, lora, adapter)) as begun:
        begins = Adapter(begun.factors(), adapter.card)
    assert begins.modules.keys() == adapter.modules.keys()
    assert torch.allclose(values(begins), values(adapter), rtol=1e-6, atol=0)
    if given is None:  # the same bits
        assert all(torch.equal(f.up, adapter.modules[key].up) for key, f in begins.modules.items())
        assert all(torch.equal(f.down, adapter.modules[key].down) for key, f in begins.modules.items())


@pytest.mark.slow
def test_a_run_begins_with_an_adapter(rex: Subject, tmp_path: Path) -> None:
    """It goes on from there, says so in its record and on its card, and is resumed exactly."""
    first = run("sd1", rex, lora=LORA)
    file = first.save(tmp_path / "first.safetensors", dtype="fp32")
    whole = run("sd1", rex, init=first, out=tmp_path / "whole")
    assert whole.digest() == run("sd1", rex, init=file).digest()
    digest = first.digest()[:16]
    assert whole.card.init == digest and first.card.init is None
    assert Adapter.load(tmp_path / "whole" / "adapter.safetensors").card.init == digest
    assert f'"init": "{digest}"' in (tmp_path / "whole" / "run.json").read_text()
    seen: list[torch.Tensor] = []
    slow = replace(CONFIG, learning_rate=1e-9, steps=1)
    run("sd1", rex, slow, init=first, on_step=lambda s: seen.append(values(Adapter(s.factors()))))
    assert torch.allclose(seen[0], values(first), atol=1e-6) and not torch.allclose(values(whole), values(first), atol=1e-4)

    def stop(step: Step) -> None:
        if step.index == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run("sd1", rex, init=first, out=tmp_path / "run", on_step=stop)
    for other, said in ((None, f"init {digest} -> None"), (whole, f"init {digest} -> {whole.digest()[:16]}")):
        with pytest.raises(TrainingError, match=said):
            run("sd1", rex, init=other, lora=LORA, out=tmp_path / "run")
    assert run("sd1", rex, init=file, out=tmp_path / "run").digest() == whole.digest()


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_drawn(rex: Subject, tmp_path: Path) -> None:
    adapter = random_adapter(base_of("sd1"), LoraSpec(rank=4, text_encoder=True))
    wrong: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
        (SettingsError, "has rank 4, and rank 2 is to be trained; pass rank=4, or lower", "sd1", {"lora": TEXT_TOO}),
        (SettingsError, "would not be trained; pass text_encoder=True", "sd1", {"lora": LoraSpec(rank=4)}),
        (SettingsError, "name it in target_modules", "sd1", {"lora": replace(TEXT_TOO, rank=4, target_modules=("to_q",))}),
        (AdapterBaseMismatch, "was made for tiny .*; tiny is Stable Diffusion XL", "sdxl", {}),
        (AdapterBaseMismatch, "tiny is Stable Diffusion 2", "sd2", {}),
    ]
    for kind, said, base, options in wrong:
        with pytest.raises(kind, match=said):
            run(base, rex, init=adapter, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_more_steps_at_a_constant_rate_are_those_of_the_longer_run(rex: Subject, tmp_path: Path) -> None:
    constant = replace(CONFIG, lr_schedule="constant")
    run("sd1", rex, replace(constant, steps=2), lora=LORA, out=tmp_path)
    longer = run("sd1", rex, constant, lora=LORA, out=tmp_path).digest()
    assert longer == run("sd1", rex, constant, lora=LORA).digest()


# --- text encoders with a learning rate of their own ---------------------------------------------------------------------


def test_text_encoders_have_their_own_learning_rate(rex: Subject) -> None:
    base = base_of("sdxl")
    config = replace(CONFIG, steps=2, learning_rate=1e-3, max_grad_norm=math.inf)
    cache = prepare(base, rex, lora=TEXT_TOO, config=config)

    def after(count: int, **changes: Any) -> dict[str, torch.Tensor]:
        steps = training_steps(base, cache, lora=TEXT_TOO, config=replace(config, **changes))
        for step in steps:
            if step.index == count:
                steps.close()  # type: ignore[attr-defined]
                return step.lora.copied()
        raise AssertionError

    with pytest.raises(SettingsError, match="has no effect while text encoders are not"):
        next(training_steps(base, cache, config=replace(config, text_encoder_learning_rate=1e-3)))
    plain, same, slower = after(2), after(2, text_encoder_learning_rate=1e-3), after(1, text_encoder_learning_rate=2.5e-4)
    assert all(torch.equal(plain[name], same[name]) for name in plain)  # two groups compute what one does
    first = after(1)
    for name, factor in first.items():
        if name.endswith(".up"):  # 0 before the first update, whose size is the rate's
            share = 1.0 if name.startswith("unet.") else 0.25
            assert torch.allclose(slower[name], share * factor, rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_two_learning_rates_is_resumed_exactly(rex: Subject, tmp_path: Path) -> None:
    config = replace(CONFIG, text_encoder_learning_rate=1e-4)
    whole = run("sd1", rex, config, lora=TEXT_TOO).digest()
    assert run("sd1", rex, config, lora=TEXT_TOO, out=tmp_path, time_limit=1e-6).card.steps == 1
    assert run("sd1", rex, config, lora=TEXT_TOO, out=tmp_path).digest() == whole
    with pytest.raises(SettingsError, match="text_encoder_learning_rate=0.0001 has no effect while text encoders are not"):
        run("sd1", rex, config, lora=LORA)


# --- own class images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_own_class_images_are_trained_by_the_class_prompt_as_they_are(kind: str, photos: Path, tmp_path: Path) -> None:
    """Pictures drawn earlier, read back from a folder, give the same latents and ids; their noise is the target."""
    base, folder = base_of(kind), tmp_path / "dogs"
    folder.mkdir()
    config = replace(CONFIG, prior_loss_weight=1.0, class_images=2, resolution=64)
    for number, image in enumerate(class_images(base, [("dog", (64, 64), 2)])[0]):
        image.image.save(folder / f"{number}.png")
    words: dict[str, Any] = {"token": "sks", "class_noun": "dog", "crop": "center"}
    drawn = prepare(base, Subject.from_folder(photos, **words), config=config)
    mine = Subject.from_folder(photos, class_images=folder, **words)
    assert len(mine.class_images) == 2 and repr(mine).endswith("3 photos, 2 class images)")
    own = prepare(base, mine, config=replace(config, class_images=0))
    ours, theirs = own.buckets[0].class_images, drawn.buckets[0].class_images
    assert ours is not None and theirs is not None and not own.class_text and own.rows_per_photo == 2
    assert torch.equal(ours.mean, theirs.mean) and ours.weights is None
    assert ours.prompts == ("a photo of a dog",) * 2 and not ours.class_prompts and not own.buckets[0].photos.class_prompts
    assert kind == "sd1" or torch.equal(ours.time_ids, theirs.time_ids)  # type: ignore[arg-type]
    (folder / "0.txt").write_text("a {class_noun} on grass")
    with pytest.raises(SubjectError, match="3 photos of the subject among the class images; pass other pictures"):
        Subject.from_folder(photos, class_images=photos, **words)
    captioned = Subject.from_folder(photos, class_images=folder, **words)
    assert [captioned.class_prompt_for(one) for one in captioned.class_images] == ["a dog on grass", "a photo of a dog"]
    said: list[str] = []
    unkept = prepare(base, mine, config=replace(config, prior_loss_weight=0.0), say=said.append)
    assert unkept.buckets[0].class_images is None and unkept.rows_per_photo == 1
    assert "your class images are not used, with prior_loss_weight=0" in said
    cat = replace(mine, token="ohwx", class_noun="cat", class_images=())
    with pytest.raises(SettingsError, match="another has none; pass some for each, or for none"):
        prepare(base, [mine, cat], config=config)


@pytest.mark.slow
def test_a_run_knows_its_class_images(photos: Path, tmp_path: Path) -> None:
    config, others = replace(CONFIG, prior_loss_weight=1.0, steps=2), tmp_path / "others"
    others.mkdir()
    for number, image in enumerate(class_images(base_of("sd1"), [("dog", (64, 64), 2)])[0]):
        image.image.save(others / f"{number}.png")

    def go(*names: str, **options: Any) -> Adapter:
        files = [others / name for name in names]
        subject = Subject.from_folder(photos, token="sks", class_noun="dog", class_images=files)
        return run("sd1", subject, config, lora=LORA, out=tmp_path / "run", **options)

    go("0.png", "1.png", time_limit=1e-6)
    with pytest.raises(TrainingError, match=r"\(step 1\): the folder of class images; use another folder"):
        go("0.png")
    assert go("0.png", "1.png").card.steps == 2
    assert str(others) not in (tmp_path / "run" / "run.json").read_text()

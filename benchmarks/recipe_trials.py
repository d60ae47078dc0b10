"""Ideas for recipes, each as a change of the training or of the drawing while a context is open, for benchmarks/likeness.py.

What gains enters the library as an option; what does not stays here, with its row in RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

import lora_booth as lb
from lora_booth.photos.cropping import Crop, Cropped, crop_photo
from lora_booth.pictures import composition
from lora_booth.pictures.inpainting import draw_into
from lora_booth.subject.wording import with_article
from lora_booth.training import class_images, encoding, loop, training_run
from lora_booth.training.latents import Batch

# --- training --------------------------------------------------------------------------------------------------------


@contextmanager
def dco(beta: float = 1000.0) -> Iterator[None]:
    """Direct Consistency Optimization (arXiv 2402.12004, eq. 7): -log sigmoid(-beta (loss - loss of the base))."""
    backward_together, predict, dreambooth_loss = loop.backward_together, loop.predict, loop.dreambooth_loss
    now: dict[str, Any] = {}

    def remembering(lora: Any, *rest: Any) -> Any:
        now["lora"] = lora
        return backward_together(lora, *rest)

    def predicting(base: Any, batch: Batch, text: Any) -> Tensor:
        with torch.no_grad(), now["lora"].muted():
            now["base"] = predict(base, batch, text)
        return predict(base, batch, text)

    def preference(base: Any, batch: Batch, predicted: Tensor, **settings: Any) -> Tensor:
        settings["prior_loss_weight"] = 0.0
        difference = dreambooth_loss(base, batch, predicted, **settings) - dreambooth_loss(base, batch, now["base"], **settings)
        return -F.logsigmoid(-beta * difference)

    with (
        patch.object(loop, "backward_together", remembering),
        patch.object(loop, "predict", predicting),
        patch.object(loop, "dreambooth_loss", preference),
    ):
        yield


@contextmanager
def timesteps(least: int = 0, below: int = 1000) -> Iterator[None]:
    """Timesteps in [least, below): T-LoRA (arXiv 2507.05964) finds that the noisiest ones memorise."""
    draw = loop.draw

    def drawing(*arguments: Any, **settings: Any) -> Batch:
        batch = draw(*arguments, **settings)
        return replace(batch, timesteps=least + batch.timesteps * (below - least) // 1000)

    with patch.object(loop, "draw", drawing):
        yield


@contextmanager
def late_decay(share: float = 0.2) -> Iterator[None]:
    """Warmup-stable-decay (arXiv 2404.06395): the rate falls in the last `share` of the updates alone, by half a cosine."""
    rate = loop.learning_rate

    def held(config: Any, step: int) -> float:
        falling = round(config.steps * (1 - share))
        if step < falling:
            return rate(replace(config, lr_schedule="constant"), step)
        return rate(replace(config, warmup_steps=0, steps=config.steps - falling), step - falling)

    with patch.object(loop, "learning_rate", held):
        yield


@contextmanager
def after_each_update(change: Callable[[loop.LoopState, Tensor], None]) -> Iterator[None]:
    """change(state, values before the update), after each update."""
    updates = training_run.updates

    def changed(state: loop.LoopState, gradients: Callable[[], Tensor]) -> Iterator[Tensor]:
        before = state.factors.values.detach().clone()
        for loss in updates(state, gradients):
            with torch.no_grad():
                change(state, before)
                before.copy_(state.factors.values)
            yield loss

    with patch.object(training_run, "updates", changed):
        yield


@contextmanager
def moving_average(decay: float = 0.99) -> Iterator[None]:
    """The file gets an exponential moving average of the factors."""
    mean: dict[int, Tensor] = {}

    def follow(state: loop.LoopState, before: Tensor) -> None:
        values = state.factors.values
        average = mean.setdefault(id(state), values.detach().clone())
        average.lerp_(values, 1 - min(decay, (state.step + 1) / (state.step + 10)))
        if state.step == state.config.steps:
            values.copy_(average)

    with after_each_update(follow):
        yield


@contextmanager
def faster_up(ratio: float = 4.0) -> Iterator[None]:
    """LoRA+ (arXiv 2402.12354): the up factors learn `ratio` times as fast."""

    def hasten(state: loop.LoopState, before: Tensor) -> None:
        now, then = (state.factors.parts_of(values) for values in (state.factors.values.data, before))
        for name, value, old in zip(state.lora.parameters, now, then, strict=True):
            if name.endswith(".up"):
                value.copy_(old + ratio * (value - old))

    with after_each_update(hasten):
        yield


@contextmanager
def photo_beside() -> Iterator[None]:
    """Seg-Mix (MuDI, arXiv 2404.04243) without cut-outs: in a class image the photo itself, made smaller, takes the place of
    the class, and the base draws the thing and the rest around it. The target is the noise there, and the base's prediction
    elsewhere."""
    loss, weights_of = loop.dreambooth_loss, encoding.error_weights

    def drawn(base: lb.BaseModel, subjects: Any, sizes: Any, config: Any, *_: Any) -> Any:
        found: Any = {}
        with base.all_on_device() as pipeline:
            pipeline.set_progress_bar_config(disable=True)
            for subject, number in product(subjects, range(config.class_images)):
                photo = crop_photo(subject.photos[number % len(subject.photos)], sizes).image
                canvas, anew = beside_an_empty_half(photo, left=number % 2 == 0)
                thing = with_article(class_images.thing_beside(subject.class_noun, number))
                token, plain = f"{subject.token} {subject.class_noun}", with_article(subject.class_noun)
                named, of_class = (
                    "a photo of " + " and ".join([words, thing][:: 1 if number % 2 == 0 else -1]) for words in (token, plain)
                )
                how: Any = {"piece": canvas, "mask": anew, "prompt": of_class, "num_inference_steps": 20, "guidance_scale": 5.0}
                image = draw_into(base, pipeline, number, **how)
                image.paste(canvas, mask=ImageChops.invert(anew))
                cropped = Cropped(image, Crop(0, 0, image.size[::-1]), anew)
                found.setdefault(image.size, []).append(class_images.Picture(cropped, named, of_class))
        return found

    def signed(masks: Tensor, background: float) -> Tensor:  # negative: of the photo
        return weights_of(masks, background) if background else torch.where(masks > 0.5, 1.0, -1.0)

    def dreambooth_loss(base: Any, batch: Batch, predicted: Tensor, *, class_targets: Any = None, **settings: Any) -> Tensor:
        if batch.weights is not None and class_targets is not None:
            signal, spread = loop.signal_and_spread(base, batch)
            noise = signal * batch.noise - spread * batch.latents if base.prediction_type == "v_prediction" else batch.noise
            class_targets = torch.where(batch.weights[batch.photos :] < 0, noise[batch.photos :], class_targets)
            batch = replace(batch, weights=batch.weights.abs())
        return loss(base, batch, predicted, class_targets=class_targets, **settings)

    with (
        patch.object(encoding, "drawn_class_images", drawn),
        patch.object(encoding, "error_weights", signed),
        patch.object(loop, "dreambooth_loss", dreambooth_loss),
    ):
        yield


def beside_an_empty_half(photo: Image.Image, *, left: bool, share: float = 0.625) -> tuple[Image.Image, Image.Image]:
    """The middle of a photo, made smaller, at the bottom of one half of a picture as large; and what is empty, as a mask."""
    width, height = photo.size
    small = photo.resize((round(share * width), round(share * height)), Image.Resampling.LANCZOS)
    cut = (small.width - width // 2) // 2
    place = (0 if left else width // 2, height - small.height)
    canvas, anew = Image.new("RGB", photo.size, "gray"), Image.new("L", photo.size, 255)
    canvas.paste(small.crop((cut, 0, cut + width // 2, small.height)), place)
    anew.paste(0, (*place, place[0] + width // 2, height))
    return canvas, anew


# --- the token's embedding ---------------------------------------------------------------------------------------------


def learn_token(base: lb.BaseModel, subject: lb.Subject, *, steps: int = 60, rate: float = 0.02, batch: int = 4) -> Tensor:
    """The embedding (d,) that makes the frozen base predict the photos best, as the first phase of AttnDreamBooth
    (arXiv 2406.05000). Of the toybox's single text encoder."""
    cache = lb.prepare(base, subject, config=lb.TrainingConfig(prior_loss_weight=0.0))
    table = base.pipeline.text_encoder.get_input_embeddings().weight
    row = base.tokenizer(subject.token).input_ids[1]
    first, values = table[row].detach().clone(), table[row].detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([values], lr=rate * first.std().item() * 5, weight_decay=0.0)
    unet_state = [parameter.requires_grad for parameter in base.unet.parameters()]
    base.unet.requires_grad_(False)
    for step in range(steps):
        drawn = loop.draw(cache, seed=1, step=step, batch_size=batch)
        ids = base.tokenizer(list(drawn.prompts), padding="max_length", return_tensors="pt").input_ids
        inputs = torch.where((ids == row)[..., None], values, table[ids].detach())
        states = encode_embeddings(base.pipeline.text_encoder, ids, inputs)
        predicted = loop.predict(base, drawn, lb.base.base_model.TextConditions(states, None))
        loss = loop.dreambooth_loss(base, drawn, predicted, prior_loss_weight=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter, flag in zip(base.unet.parameters(), unet_state, strict=True):
        parameter.requires_grad_(flag)
    return values.detach()


def encode_embeddings(encoder: Any, ids: Tensor, inputs: Tensor) -> Tensor:
    """The last states (N, tokens, d) of a CLIPTextModel, given the embeddings of its tokens."""
    table = encoder.get_input_embeddings()
    with patch.object(table, "forward", lambda _: inputs):
        return encoder(ids).last_hidden_state


@contextmanager
def token_embedding(base: lb.BaseModel, token: str, values: Tensor) -> Iterator[None]:
    """The base reads the token by this embedding."""
    table = base.pipeline.text_encoder.get_input_embeddings().weight
    row = base.tokenizer(token).input_ids[1]
    before = table[row].detach().clone()
    table.data[row] = values
    try:
        yield
    finally:
        table.data[row] = before


# --- drawing ---------------------------------------------------------------------------------------------------------


@contextmanager
def unet_calls(change: Callable[[Any, Sequence[Any], int, Any, Any], Any]) -> Iterator[None]:
    """change(unet's forward, attached adapters, number of the call in its picture, noisy latents, the other arguments)"""
    attached_layers = composition.attached_layers

    @contextmanager
    def attached(base: Any, adapters: Any) -> Iterator[Any]:
        with attached_layers(base, adapters) as on, ExitStack() as stack:
            pipeline = getattr(base, "pipeline", base)
            forward, calls = pipeline.unet.forward, {"last": -1.0, "number": 0}

            def called(latents: Tensor, timestep: Any, *rest: Any, **named: Any) -> Any:
                now = float(timestep)
                calls["number"] = 0 if now > calls["last"] else calls["number"] + 1
                calls["last"] = now
                return change(forward, on, calls["number"], latents, (timestep, *rest, named))

            stack.enter_context(patch.object(pipeline.unet, "forward", called))
            yield on

    with patch.object(composition, "attached_layers", attached):
        yield


@contextmanager
def weaker_unconditional(share: float = 0.0) -> Iterator[None]:
    """Personalization guidance (arXiv 2508.00319): the unconditional half with `share` of the adapter's weight."""

    def halves(forward: Any, on: Sequence[Any], number: int, latents: Tensor, others: Any) -> Any:
        *positional, named = others
        states = named["encoder_hidden_states"]
        named = {key: value for key, value in named.items() if key not in ("encoder_hidden_states", "return_dict")}
        parts, weights = [], [adapter.weight for adapter in on]
        for half, (x, text) in enumerate(zip(latents.chunk(2), states.chunk(2), strict=True)):
            for adapter, weight in zip(on, weights, strict=True):
                adapter.use(weight if half else weight * share)
            parts.append(forward(x, *positional, encoder_hidden_states=text, return_dict=False, **named)[0])
        for adapter, weight in zip(on, weights, strict=True):
            adapter.use(weight)
        return (torch.cat(parts),)

    with unet_calls(halves):
        yield


@contextmanager
def class_prompt_first(token: str, calls: int = 4) -> Iterator[None]:
    """Superclass sampling (arXiv 2502.05895): the class prompt, with the adapter, in the first `calls` of 20 steps."""
    generate = lb.Composition.generate
    now: dict[str, Any] = {}

    def generating(self: Any, prompt: str, **settings: Any) -> Any:
        now["plain"] = self.base.encode_text([prompt.replace(f"{token} ", "", 1)]).states
        return generate(self, prompt, **settings)

    def first(forward: Any, on: Sequence[Any], number: int, latents: Tensor, others: Any) -> Any:
        *positional, named = others
        states = named["encoder_hidden_states"]
        if number < calls:
            half = len(states) // 2
            states = torch.cat([states[:half], now["plain"].expand(half, -1, -1)])
        return forward(latents, *positional, **{**named, "encoder_hidden_states": states})

    with patch.object(lb.Composition, "generate", generating), unet_calls(first):
        yield

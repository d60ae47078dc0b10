"""train(): photos in, one small adapter out. The loop itself is `training_steps`."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .adapters import Adapter, Card
from .base_model import BaseModel, rare_tokens
from .checkpoint import latest_checkpoint, save_checkpoint
from .config import LoraSpec, TrainingConfig
from .errors import MissingExtraError, SettingsError, TrainingError
from .generation import generate_images
from .injection import TrainableLora, target_paths, trainable
from .latents import LatentCache, conditions, draw, encode, encode_prompts, step_seed
from .loss import dreambooth_loss
from .photos import crop_and_resize, open_photo
from .prior import class_images
from .progress import Display, Step, display
from .subject import Subject, check_token

BAD_STEPS = 3  # updates in a row without a finite loss before training gives up


def train(
    base: BaseModel,
    subject: Subject | Sequence[Subject],
    *,
    lora: LoraSpec | None = None,
    config: TrainingConfig | None = None,
    out: str | Path | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Adapter:
    """Teach `base` one subject, or several; `base` comes back bit-identical, also after an exception.

    out       a folder for the run: its checkpoints, samples and `adapter.safetensors`. The same call on an
              interrupted run continues it and ends with the same tensors as one that was never interrupted.
    on_step   called after every optimizer update
    progress  show step, loss, rate and time left: a live bar in a terminal or notebook, else plain lines
    Raises SettingsError, TrainingError, PhotoError.
    """
    subjects = [subject] if isinstance(subject, Subject) else list(subject)
    if not subjects:
        raise SettingsError("no subject to train on; give one, as Subject.from_folder(...)")
    lora = lora or LoraSpec()
    config = settled(config or TrainingConfig(), base, sum(len(s.photos) for s in subjects))
    check_feasible(base, lora, config)
    run = Path(out) if out is not None else None
    with display(progress) as shown:
        for note in token_notes(base, subjects):
            shown.say(f"note: {note}")
        cache = prepare(base, subjects, lora=lora, config=config, shown=shown)
        identity = run_identity(base, cache, lora, config)
        resume = latest_checkpoint(run, identity=identity, device=base.device) if run is not None else None
        if run is not None:
            write_run_file(run, base, lora, config, identity)
        with ExitStack() as stack:
            if not lora.text_encoder:
                stack.enter_context(base.only_unet_on_device())
            steps = TrainingRun(base, cache, lora, config, run=run, identity=identity, resume=resume)
            stack.callback(steps.close)
            shown.start(config.steps or 0)
            for step in steps:
                shown.update(step)
                if on_step is not None:
                    on_step(step)
                if run is not None and config.sample_every and step.index % config.sample_every == 0:
                    prompt = config.sample_prompt or subjects[0].instance_prompt
                    sample(base, prompt, run / "samples" / f"{step.index:06d}.png", config)
            factors = steps.factors
    adapter = Adapter(factors, make_card(base, subjects, lora, config))
    if run is not None:
        adapter.save(run / "adapter.safetensors")
    return adapter


def training_steps(
    base: BaseModel, cache: LatentCache, *, lora: LoraSpec | None = None, config: TrainingConfig | None = None
) -> Iterator[Step]:
    """Yield after each optimizer update, so stopping early loses nothing: `step.factors()` is what is learnt so far."""
    lora = lora or LoraSpec()
    config = settled(config or TrainingConfig(), base, len(cache.photos))
    run = TrainingRun(base, cache, lora, config)
    try:
        yield from run
    finally:
        run.close()


# --- defaults ------------------------------------------------------------------------------------------------------

STEPS_PER_PHOTO = 100
FEWEST_STEPS, MOST_STEPS = 400, 1500
CUSTOMARY_RATE, CUSTOMARY_WIDTH = 1e-4, 1280  # of LoRA on SD 1.x, 2.x and SDXL, whose widest layers have 1280 channels
RATE_POWER = 1.5  # a narrower U-Net bears a higher rate: 3e-3 measured at 128 channels (the toybox)
CLASS_IMAGES_PER_PHOTO = 10


def settled(config: TrainingConfig, base: BaseModel, photos: int) -> TrainingConfig:
    """`config` without a None where training needs a value; `docs/defaults.md` gives each reason."""
    steps = config.steps or min(MOST_STEPS, max(FEWEST_STEPS, STEPS_PER_PHOTO * photos))
    width = max(base.unet.config.block_out_channels)
    resolution = config.resolution or base.resolution
    if resolution % base.pixels_per_latent:
        raise SettingsError(f"resolution {resolution} is out of range; allowed: multiples of {base.pixels_per_latent}")
    return replace(
        config,
        steps=steps,
        learning_rate=config.learning_rate or CUSTOMARY_RATE * (CUSTOMARY_WIDTH / width) ** RATE_POWER,
        warmup_steps=min(steps // 20, 50) if config.warmup_steps is None else config.warmup_steps,
        class_images=config.class_images or min(100, CLASS_IMAGES_PER_PHOTO * photos),
        resolution=resolution,
    )


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of update `step` (from 0): linear warm-up, then constant or a half cosine to 0."""
    assert config.steps and config.learning_rate is not None and config.warmup_steps is not None
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def check_feasible(base: BaseModel, lora: LoraSpec, config: TrainingConfig) -> None:
    """What would fail after the class images are drawn fails before."""
    target_paths(base, lora)
    if config.attention == "xformers":
        check_xformers(base)


def token_notes(base: BaseModel, subjects: Sequence[Subject]) -> Iterator[str]:
    """What speaks against the chosen tokens, in the words of the base's own tokenizer."""
    for subject in subjects:
        report = check_token(subject.token, base.tokenizer, known_rare=rare_tokens(base))
        yield from (*report.problems, *report.warnings)


# --- before the loop -----------------------------------------------------------------------------------------------


def prepare(
    base: BaseModel,
    subjects: Sequence[Subject],
    *,
    lora: LoraSpec,
    config: TrainingConfig,
    shown: Display | None = None,
) -> LatentCache:
    """Photos, class images and prompts -> LatentCache. The last time that the VAE and the text encoders are needed."""
    config = settled(config, base, sum(len(s.photos) for s in subjects))
    assert config.resolution and config.class_images
    said = shown or Display()
    images, crops, prompts = [], [], []
    for subject in subjects:
        for photo in subject.photos:
            image, crop = crop_and_resize(open_photo(photo), config.resolution, photo.crop)
            images.append(image)
            crops.append(crop)
            prompts.append(subject.prompt_for(photo))
    said.say(f"{len(images)} photos at {config.resolution} px")
    photos = encode(base, images, crops, prompts, flip=config.flip)
    prior = None
    if config.prior_loss_weight > 0:
        whole = replace(crops[0], top=0, left=0, original_size=(config.resolution, config.resolution))
        pictures, class_prompts = [], []
        for prompt in dict.fromkeys(s.class_prompt for s in subjects):
            pictures += class_images(
                base, prompt, config.class_images, resolution=config.resolution, seed=config.seed, on_progress=said.class_images
            )
            class_prompts += [prompt] * config.class_images
        prior = encode(base, pictures, [whole] * len(pictures), class_prompts, flip=config.flip)
    every_prompt = [*photos.prompts, *(prior.prompts if prior is not None else ())]
    text = {} if lora.text_encoder else encode_prompts(base, every_prompt)
    return LatentCache(photos, prior, base.scaling_factor, text)


# --- the loop ------------------------------------------------------------------------------------------------------


class TrainingRun(Iterator[Step]):
    """The state of one training: an iterator of `Step`s. `close()` takes the adapter out of the base."""

    def __init__(
        self,
        base: BaseModel,
        cache: LatentCache,
        lora: LoraSpec,
        config: TrainingConfig,
        *,
        run: Path | None = None,
        identity: str = "",
        resume: dict[str, Any] | None = None,
    ) -> None:
        self.base, self.cache, self.config, self.run, self.identity = base, cache, config, run, identity
        self.dropout = lora.dropout
        self._stack = ExitStack()
        try:
            self.lora: TrainableLora = self._stack.enter_context(trainable(base, lora, seed=config.seed))
            self._stack.enter_context(training_mode(base, config))
            parameters = self.lora.named_parameters()
            for name, parameter in parameters.items():
                if parameter.dtype != torch.float32:
                    raise TrainingError(f"{name} is {parameter.dtype}; adapter weights must be float32")
            self.parameters = list(parameters.values())
            self.optimizer = torch.optim.AdamW(
                self.parameters,
                lr=config.learning_rate or 0.0,
                weight_decay=config.weight_decay,
                fused=base.device.type != "mps",
            )
            self.scaler = torch.amp.GradScaler(
                base.device.type, enabled=base.dtype == torch.float16 and base.device.type == "cuda"
            )
            self.step, self.bad, self.started = 0, 0, time.monotonic()
            self.smoothed: float | None = None
            if resume is not None:
                self._restore(resume)
            self.first = self.step
        except BaseException:
            self.close()
            raise

    @property
    def factors(self) -> dict[str, Any]:
        return self.lora.factors()

    def close(self) -> None:
        self._stack.close()

    def __next__(self) -> Step:
        config = self.config
        assert config.steps is not None
        if self.step >= config.steps:
            raise StopIteration
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.base.device)
        for part in range(config.gradient_accumulation):
            index = self.step * config.gradient_accumulation + part
            with self._dropout_drawn_from(index):
                loss = self._forward(index) / config.gradient_accumulation
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        if self.step == 0 and not self.scaler.is_enabled():
            self.lora.check_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        value = self._guard(total, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        last = self.step == config.steps
        if self.run is not None and (last or self.step % config.checkpoint_every == 0):
            save_checkpoint(self.run, self.step, self._state(), identity=self.identity)
        return self._report(value)

    @contextmanager
    def _dropout_drawn_from(self, index: int) -> Iterator[None]:
        """Dropout has only the global generator: seeded for this forward pass, then left as it was."""
        if not self.dropout:
            yield
            return
        devices = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(step_seed(self.config.seed, index))
            yield

    def _forward(self, index: int) -> Tensor:
        config = self.config
        batch, noise, timesteps = draw(self.cache, seed=config.seed, step=index, batch_size=config.batch_size)
        return dreambooth_loss(
            self.base,
            batch,
            conditions(self.base, self.cache, batch.prompts),
            noise,
            timesteps,
            prior_loss_weight=config.prior_loss_weight,
            min_snr_gamma=config.min_snr_gamma,
        )

    def _guard(self, loss: Tensor, norm: Tensor) -> float:
        """The loss as a number; an update that is not finite is skipped, three in a row end the training."""
        value = loss.item()
        if math.isfinite(value) and (norm.isfinite().item() or self.scaler.is_enabled()):
            self.bad = 0
            return value
        self.bad += 1
        if self.bad >= BAD_STEPS:
            raise TrainingError(
                f"the loss was not finite {BAD_STEPS} times in a row, at step {self.step + 1}; "
                f"lower learning_rate (now {self.config.learning_rate:g}) or load the base with dtype=torch.float32"
            )
        self.optimizer.zero_grad(set_to_none=True)  # nothing to apply
        return value

    def _report(self, value: float) -> Step:
        if math.isfinite(value):
            self.smoothed = value if self.smoothed is None else 0.95 * self.smoothed + 0.05 * value
        elapsed = time.monotonic() - self.started
        steps = self.config.steps or 0
        return Step(
            index=self.step,
            total=steps,
            loss=value,
            smoothed_loss=value if self.smoothed is None else self.smoothed,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=elapsed,
            seconds_left=elapsed / (self.step - self.first) * (steps - self.step),
            lora=self.lora,
        )

    def _state(self) -> dict[str, Any]:
        return {
            "lora": {name: p.detach().cpu() for name, p in self.lora.named_parameters().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "smoothed": self.smoothed,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.lora.named_parameters().items():
                parameter.copy_(state["lora"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.smoothed = int(state["step"]), state["smoothed"]


@contextmanager
def modes_kept(base: BaseModel) -> Iterator[None]:
    """Every module in training or evaluation mode as before."""
    modes = [(module, module.training) for model in base.components.values() for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def training_mode(base: BaseModel, config: TrainingConfig) -> Iterator[None]:
    """Dropout on, memory-efficient attention, gradient checkpointing; all as it was afterwards."""
    processors = base.unet.attn_processors
    checkpointing = base.unet.is_gradient_checkpointing
    try:
        with modes_kept(base):
            for module in (m for model in base.components.values() for m in model.modules() if hasattr(m, "lora_dropout")):
                module.train()
            if config.attention == "xformers":
                base.unet.enable_xformers_memory_efficient_attention()
            if config.gradient_checkpointing:
                base.unet.enable_gradient_checkpointing()
                base.unet.train()  # diffusers checkpoints in training mode only; its U-Nets have no active dropout
            yield
    finally:
        if config.attention == "xformers":
            base.unet.set_attn_processor(processors)
        if config.gradient_checkpointing and not checkpointing:
            base.unet.disable_gradient_checkpointing()


def check_xformers(base: BaseModel) -> None:
    try:
        import xformers  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('attention="xformers"', "xformers") from error
    if base.device.type != "cuda":
        raise SettingsError(f'attention="xformers" needs a CUDA GPU and the base is on {base.device}; use attention="sdpa"')


# --- the run's folder ----------------------------------------------------------------------------------------------


def run_identity(base: BaseModel, cache: LatentCache, lora: LoraSpec, config: TrainingConfig) -> str:
    """What a run computes: equal identities give equal adapters on one machine."""
    free = {"checkpoint_every", "sample_every", "sample_prompt"}
    digest = hashlib.sha256()
    facts = {"base": base.fingerprint, "dtype": str(base.dtype), "lora": asdict(lora)}
    facts["config"] = {key: value for key, value in asdict(config).items() if key not in free}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for items in (cache.photos, cache.class_images):
        if items is not None:
            digest.update("\0".join(items.prompts).encode())
            digest.update(items.mean.cpu().numpy().tobytes())
    return digest.hexdigest()


def write_run_file(run: Path, base: BaseModel, lora: LoraSpec, config: TrainingConfig, identity: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    facts = {"lora_booth": __version__, "base": base.name, "identity": identity, "lora": asdict(lora), "config": asdict(config)}
    (run / "run.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def sample(base: BaseModel, prompt: str, path: Path, config: TrainingConfig) -> None:
    """A picture by the U-Net under training, without dropout, on the run's seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with base.all_on_device(), modes_kept(base):
        for model in base.components.values():
            model.eval()
        generate_images(base.pipeline, prompt, [config.seed], size=config.resolution)[0].save(path)


def card_facts(base: BaseModel) -> dict[str, Any]:
    """What a card says about the base."""
    return {
        "family": base.family.name,
        "prediction_type": base.prediction_type,
        "base_model": base.name,
        "base_hash": base.fingerprint,
    }


def make_card(base: BaseModel, subjects: Sequence[Subject], lora: LoraSpec, config: TrainingConfig) -> Card:
    first = subjects[0]
    return Card(
        **card_facts(base),
        resolution=config.resolution,
        token=first.token,
        class_noun=first.class_noun,
        prompt=first.instance_prompt,
        rank=lora.rank,
        alpha=lora.scale_alpha,
        steps=config.steps,
        photos=sum(len(s.photos) for s in subjects),
        library_version=__version__,
        title=" and ".join(f"{s.token} {s.class_noun}" for s in subjects),
    )

"""train(): photos in, one small adapter out. The loop itself is `training_steps`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..adapters import Adapter
from ..base_model import BaseModel
from ..checkpoint import latest_checkpoint, save_checkpoint
from ..config import LoraSpec, TrainingConfig
from ..errors import SettingsError
from ..latents import LatentCache
from ..progress import Step, display
from ..subject import Subject
from .card import make_card
from .folder import run_identity, sample, write_run_file
from .loop import TrainingRun
from .modes import check_feasible
from .preparation import prepare, token_notes
from .settings import settled


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
            steps = TrainingRun(base, cache, lora, config, resume=resume, say=shown.say)
            stack.callback(steps.close)
            shown.start(config.steps or 0)
            for step in steps:
                if run is not None and (step.index == config.steps or step.index % config.checkpoint_every == 0):
                    save_checkpoint(run, step.index, steps.state(), identity=identity)
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

"""Make the toybox base from nothing: `python -m lora_booth.toybox.build --work DIR`.

Four stages, each resumable (run the same command again) and each on the renders of `world.py` only:

    vae      AutoencoderKL, pictures <-> latents
    unet     tokenizer, CLIPTextModel and UNet2DConditionModel, text -> latents
    judge    the network that reads class, context, colours, pattern and accessory off a picture
    export   the three as a stock StableDiffusionPipeline folder plus the judge, fp16

On two CPU cores: see `benchmarks/RESULTS.md`. With CUDA it takes minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import RARE_TOKENS, world
from .judge import OBJECT_HEADS, SCENE_HEADS, JudgeNet, judge_loss, labels

RENDERS = 40_000  # distinct training pictures
HELD_OUT_RENDERS, HELD_OUT_SEED = 500, 10_000_000  # for the figures in the log
SIZE = 64  # pixels
MAX_TOKENS = 24
TEXT_WIDTH = 128


# --- a training stage: fixed steps, cosine rate, EMA, resume -------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int
    rate: float  # AdamW, warmed up over 2 % of the steps, then cosine to 0
    ema: float = 0.999


def run_stage(
    stage: Stage,
    model: nn.Module,
    loss_of: Callable[[Any, int, torch.Generator], Tensor],
    work: Path,
    log: dict[str, Any],
    *,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
) -> Any:
    """Train `model`; return its moving average. Every random draw comes from (stage, step), so resuming is exact."""
    device = next(model.parameters()).device
    done, state_file = work / f"{stage.name}.pt", work / f"{stage.name}.state.pt"
    average = copy.deepcopy(model).requires_grad_(False).eval()
    if done.exists():
        average.load_state_dict(torch.load(done, map_location=device, weights_only=True))
        return average
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    decayed = [p for n, p in model.named_parameters() if not (p.ndim < 2 or "embedding" in n)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.99), fused=True)
    first, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    started, saved, losses = time.time(), time.time(), []
    for step in range(first, stage.steps):
        warm = min(1.0, (step + 1) / (0.02 * stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * warm * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        loss = loss_of(model, step, torch.Generator().manual_seed(step * 1_000_003 + sum(map(ord, stage.name))))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(stage.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = spent + time.time() - started
            left = (stage.steps - step - 1) * (time.time() - started) / (step + 1 - first)
            mean_loss = sum(losses[-100:]) / len(losses[-100:])
            print(
                f"{stage.name} {step + 1}/{stage.steps}  loss {mean_loss:.4f}  {seconds:.0f} s, {left:.0f} s left", flush=True
            )
        if time.time() - saved > 120 or step + 1 == stage.steps:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save(state | {"step": step + 1, "seconds": spent + time.time() - started}, state_file)
            saved = time.time()
    log[stage.name] = {"steps": stage.steps, "batch": stage.batch, "rate": stage.rate}
    log[stage.name] |= {
        "seconds": round(spent + time.time() - started),
        "loss": sum(losses[-200:]) / max(1, len(losses[-200:])),
    }
    log[stage.name]["parameters"] = sum(p.numel() for p in model.parameters())
    if evaluate is not None:
        log[stage.name] |= evaluate(average)
    print(json.dumps(log[stage.name]), flush=True)
    (work / "log.json").write_text(json.dumps(log, indent=1))
    save(average.state_dict(), done)
    state_file.unlink(missing_ok=True)
    return average


def save(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


# --- pictures ------------------------------------------------------------------------------------------------------


def renders(work: Path, count: int, first_seed: int = 0) -> np.ndarray:
    """(count, SIZE, SIZE, 3) uint8, drawn once and kept as a file."""
    path = work / f"renders_{first_seed}_{count}.npy"
    if not path.exists():
        pictures = np.stack([np.asarray(world.draw(world.random_scene(first_seed + i), SIZE).image) for i in range(count)])
        np.save(path.with_suffix(".tmp.npy"), pictures)
        os.replace(path.with_suffix(".tmp.npy"), path)
    return np.load(path, mmap_mode="r")


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- VAE -----------------------------------------------------------------------------------------------------------

VAE_STAGE = Stage("vae", steps=9000, batch=16, rate=2.5e-3)
VAE_CROP_STEPS = 4000  # first on crops of 32 x 32, twice as many: half the cost of whole pictures


def new_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 72),
        layers_per_block=1,
        latent_channels=6,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def vae_loss(vae: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + 0.5 x L1 of the image gradients + 1e-3 x KL."""
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
    y = y.float()
    d = y - x
    edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return d.abs().mean() + 0.5 * edges + 1e-3 * kl


def train_vae(work: Path, device: torch.device, log: dict[str, Any]) -> nn.Module:
    pictures, held_out = renders(work, RENDERS), renders(work, HELD_OUT_RENDERS, HELD_OUT_SEED)

    def loss_of(vae: Any, step: int, generator: torch.Generator) -> Tensor:
        small = step < VAE_CROP_STEPS
        count = VAE_STAGE.batch * (2 if small else 1)
        x = to_tensor(pictures[torch.randint(len(pictures), (count,), generator=generator).sort().values.numpy()])
        if small:
            top, left = torch.randint(0, SIZE - 32 + 1, (2,), generator=generator).tolist()
            x = x[..., top : top + 32, left : left + 32]
        return vae_loss(vae, x.to(device, memory_format=torch.channels_last), generator)

    def evaluate(vae: Any) -> dict[str, float]:
        with torch.no_grad():
            x = to_tensor(held_out).to(device)
            errors = [
                (vae.decode(vae.encode(b).latent_dist.mean).sample.clamp(-1, 1) - b).abs().mean() for b in torch.split(x, 50)
            ]
        return {"mean_absolute_error": torch.stack(errors).mean().item()}

    vae = new_vae().to(device, memory_format=torch.channels_last)
    return run_stage(VAE_STAGE, vae, loss_of, work, log, evaluate=evaluate)


# --- judge ---------------------------------------------------------------------------------------------------------

JUDGE_STAGE = Stage("judge", steps=2500, batch=64, rate=2e-3)


def train_judge(work: Path, device: torch.device, log: dict[str, Any]) -> nn.Module:
    pictures, held_out = renders(work, RENDERS), renders(work, HELD_OUT_RENDERS, HELD_OUT_SEED)
    targets = torch.tensor([labels(world.random_scene(i)) for i in range(RENDERS)])
    held_out_targets = torch.tensor([labels(world.random_scene(HELD_OUT_SEED + i)) for i in range(HELD_OUT_RENDERS)])

    def loss_of(net: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures), (JUDGE_STAGE.batch,), generator=generator).sort().values
        x = to_tensor(pictures[index.numpy()])
        if step % 2:  # generated pictures are softer than renders
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = x + 0.08 * torch.rand((), generator=generator) * torch.randn(x.shape, generator=generator)
        with torch.autocast(device.type, torch.bfloat16):
            return judge_loss(net, x.to(device, memory_format=torch.channels_last), targets[index].to(device))

    def evaluate(net: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            logits, _ = net(to_tensor(held_out).to(device))
        names = [f"{slot}.{name}" for slot in ("first", "second") for name in OBJECT_HEADS] + list(SCENE_HEADS)
        right = [
            (head.argmax(1).cpu() == t)[t != -100].float().mean() for head, t in zip(logits, held_out_targets.T, strict=True)
        ]
        return {f"accuracy.{name}": round(value.item(), 4) for name, value in zip(names, right, strict=True)}

    net: Any = JudgeNet()
    net.to(device, memory_format=torch.channels_last)
    return run_stage(JUDGE_STAGE, net, loss_of, work, log, evaluate=evaluate)


# --- text to image -------------------------------------------------------------------------------------------------

UNET_STAGE = Stage("unet", steps=6000, batch=32, rate=1e-3, ema=0.9985)
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PREDICTION = "v_prediction"
NO_PROMPT_SHARE = 0.1  # for classifier-free guidance


def new_tokenizer() -> Any:
    """A CLIP tokenizer in which every word of the world's captions, and every rare token, is one token."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = {w for c in world.CONTEXTS for w in c.split()} | set(world.CLASSES) | set(world.COLORS) | set(world.STYLES)
    words |= {"a", "an", "and", "of", *RARE_TOKENS}
    letters = list(bytes_to_unicode().values())
    vocabulary, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    spellings = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    while pairs := Counter(p for s in spellings.values() for p in pairwise(s)):  # byte-pair encoding, most frequent first
        pair = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(pair)
        vocabulary.append("".join(pair))
        spellings = {word: merged(spelling, pair) for word, spelling in spellings.items()}
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, merges=merges, model_max_length=MAX_TOKENS)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def merged(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in spelling:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def new_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=6,
        out_channels=6,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # heads, as in SD 1.x
        norm_num_groups=16,
    )


class TextToImage(nn.Module):
    """Text encoder and U-Net, trained together."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(tokenizer)
        self.unet = new_unet()

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.text_encoder(ids).last_hidden_state).sample


@torch.no_grad()
def encode_renders(vae: Any, work: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every render's latents: two (RENDERS, 6, 16, 16) float16 tensors."""
    path = work / "latents.pt"
    if not path.exists():
        pictures, means, deviations = renders(work, RENDERS), [], []
        for first in range(0, RENDERS, 100):
            x = to_tensor(pictures[first : first + 100]).to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                posterior = vae.encode(x).latent_dist
            means.append(posterior.mean.half().cpu())
            deviations.append(posterior.std.half().cpu())
        save({"mean": torch.cat(means), "std": torch.cat(deviations)}, path)
    state = torch.load(path, weights_only=True)
    return state["mean"], state["std"]


def scaling_factor(mean: Tensor, std: Tensor) -> float:
    """1 / standard deviation of sampled latents, so that the U-Net sees unit variance."""
    return round(1 / (mean.float().var() + std.float().square().mean()).sqrt().item(), 5)


def training_caption(scene: world.Scene, rng: random.Random) -> str:
    if rng.random() < NO_PROMPT_SHARE:
        return ""
    return scene.caption(colors=rng.random() < 0.6, context=rng.random() < 0.85)


def train_text_to_image(vae: Any, work: Path, device: torch.device, log: dict[str, Any]) -> tuple[Any, Any, float]:
    mean, std = encode_renders(vae, work, device)
    factor = scaling_factor(mean, std)
    scenes = [world.random_scene(i) for i in range(RENDERS)]
    tokenizer = new_tokenizer()
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)

    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(RENDERS, (UNET_STAGE.batch,), generator=generator)
        rng = random.Random(step)
        ids = tokenizer(
            [training_caption(scenes[i], rng) for i in index.tolist()],
            padding="max_length",
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).input_ids
        noise = torch.randn((2, *mean[index].shape), generator=generator)
        latents = factor * (mean[index].float() + std[index].float() * noise[0])
        t = torch.randint(1000, (len(index),), generator=generator)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        noisy, velocity = a * latents + s * noise[1], a * noise[1] - s * latents
        snr = alphas[t] / (1 - alphas[t])
        weight = snr.clamp(max=5) / (snr + 1)  # min-SNR for v-prediction (arXiv 2303.09556)
        with torch.autocast(device.type, torch.bfloat16):
            prediction = model(noisy.to(device, memory_format=torch.channels_last), t.to(device), ids.to(device))
        error = (prediction.float() - velocity.to(device)).square().mean((1, 2, 3))
        return (error * weight.to(device)).mean()

    model: Any = TextToImage(tokenizer).to(device)
    model.unet.to(memory_format=torch.channels_last)
    return run_stage(UNET_STAGE, model, loss_of, work, log), tokenizer, factor


@torch.no_grad()
def place_rare_tokens(text_encoder: Any, tokenizer: Any, *, candidates: int = 400) -> dict[str, float]:
    """Give every rare token an embedding that the text encoder can tell from its words; returns how far each stands.

    CLIP has seen its rare tokens a few times, so each has a state of its own. Ours were never trained: the text
    encoder is blind to their initial directions, and "sks dog" would read like "a dog". Each gets the mixture of word
    embeddings, as long as a word's, that stands farthest from every colour, the article and the tokens before it.
    """
    generator = torch.Generator().manual_seed(0)
    table = text_encoder.get_input_embeddings().weight
    one = {w: tokenizer(w).input_ids[1] for w in (*world.COLORS, *world.CLASSES, "a", *RARE_TOKENS)}
    words = table[[one[w] for w in (*world.COLORS, *world.CLASSES)]]
    length = words.norm(dim=1).mean()

    def states(word: str) -> Tensor:
        prompts = [f"a photo of {word} {noun}" for noun in ("dog", "mug")]
        ids = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        return text_encoder(ids.to(table.device)).last_hidden_state.flatten()

    taken, distances = [states(w) for w in (*world.COLORS, "a")], {}
    for token in RARE_TOKENS:
        best, farthest = table[one[token]].clone(), 0.0
        for _ in range(candidates):
            mixture = torch.randn(len(words), generator=generator).to(table) @ (words - words.mean(0))
            table[one[token]] = words.mean(0) + mixture / mixture.norm() * length
            state = states(token)
            nearest = min((state - other).norm().item() for other in taken)
            if nearest > farthest:
                best, farthest = table[one[token]].clone(), nearest
        table[one[token]] = best
        taken.append(states(token))
        distances[token] = round(farthest, 2)
    return distances


# --- export --------------------------------------------------------------------------------------------------------


def export(vae: Any, model: Any, tokenizer: Any, factor: float, judge: nn.Module, folder: Path) -> None:
    """Write a stock diffusers pipeline folder, fp16, plus `judge/judge.safetensors`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import save_file

    vae.register_to_config(scaling_factor=factor)
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=PREDICTION, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu().half(),
        text_encoder=model.text_encoder.cpu().half(),
        tokenizer=tokenizer,
        unet=model.unet.cpu().half(),
        scheduler=scheduler,
        safety_checker=None,  # nothing in the drawn world needs one
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers 5 loads a text encoder in the precision of its configuration, diffusers the U-Net in fp32
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    (folder / "judge").mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in judge.cpu().state_dict().items()}, folder / "judge" / "judge.safetensors")


def build(work: Path, folder: Path, device: torch.device) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    log = json.loads((work / "log.json").read_text()) if (work / "log.json").exists() else {}
    torch.manual_seed(0)
    vae = train_vae(work, device, log)
    torch.manual_seed(1)
    judge = train_judge(work, device, log)
    torch.manual_seed(2)
    model, tokenizer, factor = train_text_to_image(vae, work, device, log)
    log["rare_tokens"] = place_rare_tokens(model.text_encoder, tokenizer)
    (work / "log.json").write_text(json.dumps(log, indent=1))
    export(vae, model, tokenizer, factor, judge, folder)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toybox base from nothing. Run again to continue.")
    parser.add_argument("--work", type=Path, required=True, help="folder for renders and training state (about 1 GB)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", help="the pipeline folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    build(arguments.work, arguments.out, torch.device(arguments.device))


if __name__ == "__main__":
    main()

"""`python -m tools.toybox`: every stage in turn, then the export."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_booth.base.base_model import TOYBOX_FOLDER
from lora_booth.base.diffusers_folder import DECLARED

from .judge import train_judge
from .text import RARE_TOKENS, new_tokenizer, place_rare_tokens, train_text_encoder
from .unet import PREDICTION, SCHEDULE, train_text_to_image
from .vae import train_vae


def export(vae: Any, model: Any, tokenizer: Any, factor: float, judge: nn.Module, folder: Path) -> None:
    """Write a stock diffusers pipeline folder, fp16, plus `judge/judge.safetensors`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import save_file

    vae.register_to_config(scaling_factor=factor)
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=PREDICTION, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu().half(),
        text_encoder=model.reader.text_encoder.cpu().half(),
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
    (folder / DECLARED).write_text(json.dumps({"rare_tokens": RARE_TOKENS}) + "\n")
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
    tokenizer = new_tokenizer()
    reader = train_text_encoder(work, device, log, tokenizer)
    model, factor = train_text_to_image(vae, reader, tokenizer, work, device, log)
    log["rare_tokens"] = place_rare_tokens(model.reader.text_encoder, tokenizer)
    (work / "log.json").write_text(json.dumps(log, indent=1))
    export(vae, model, tokenizer, factor, judge, folder)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toybox base from nothing. Run again to continue.")
    parser.add_argument("--work", type=Path, required=True, help="folder for renders and training state (about 1 GB)")
    parser.add_argument("--out", type=Path, default=TOYBOX_FOLDER, help="the pipeline folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    build(arguments.work, arguments.out, torch.device(arguments.device))


if __name__ == "__main__":
    main()

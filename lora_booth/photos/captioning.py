"""Captions by a model, for photos that have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import typed
from ..errors import PhotoError, reason_of, shown

Captioner = Callable[[Image.Image], str]  # an upright RGB picture -> what is in it

BLIP = "Salesforce/blip-image-captioning-base"  # 1 GB, BSD licence; its captions are one short sentence
MOST_TOKENS = 40  # of a caption; chosen: a text encoder reads 75


def caption_model(model: str | Path = BLIP, *, device: str | None = None) -> Captioner:
    """A captioner by a model of transformers that describes a picture without a question, as BLIP and GIT do.

    model   a Hub id, downloaded at first use, or a folder
    device  None: the GPU, or else the CPU
    Raises PhotoError if it cannot be loaded.
    """
    source, place = str(typed("model", model, str | Path)), typed("device", device, str | None)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = place or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        processor: Any = AutoProcessor.from_pretrained(source)
        net: Any = AutoModelForImageTextToText.from_pretrained(source).eval().to(place)
    except Exception as error:  # what the libraries raise has no bounds
        raise PhotoError(
            f"{shown(source)}: cannot be loaded as a caption model ({reason_of(error)[:120]}); pass a folder or Hub id of a "
            f"model like {BLIP}, or any function as the captioner"
        ) from None

    @torch.no_grad()
    def caption(picture: Image.Image) -> str:
        pixels = processor(images=picture, return_tensors="pt").pixel_values.to(place)
        tokens = net.generate(pixel_values=pixels, max_new_tokens=MOST_TOKENS, do_sample=False, num_beams=1)
        return str(processor.batch_decode(tokens, skip_special_tokens=True)[0])

    return caption

"""Silence messages and progress bars of other libraries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HIDDEN = ("requires torchvision", "longer than the specified maximum sequence length", "was truncated because CLIP")


def not_hidden(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in HIDDEN)


def quiet_about_torchvision() -> None:
    """Hide transformers' advice to install torchvision: nothing here uses it, and its wheels break a CPU build of torch."""
    logging.getLogger("transformers.utils.import_utils").addFilter(not_hidden)


@contextmanager
def quiet_about_long_prompts(pipeline: Any) -> Iterator[None]:
    """Hide that a prompt is cut, and transformers' false alarm of "indexing errors": `BaseModel.cut_off` tells what is lost."""
    names = {one.__module__ for one in type(pipeline).__mro__} | {"transformers.tokenization_utils_base"}
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(not_hidden)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(not_hidden)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers, but not those of downloads."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as of_transformers

    downloads = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    enabled = [one for one in (of_diffusers, of_transformers) if one.is_progress_bar_enabled()]
    try:
        for one in enabled:
            one.disable_progress_bar()  # transformers also switches those of downloads
        downloads()
        yield
    finally:
        for one in enabled:
            one.enable_progress_bar()
        downloads()

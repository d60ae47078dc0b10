"""What other libraries would say while this one works."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_about_torchvision() -> None:
    """transformers advises to install it, at every start; nothing here uses it, and its wheels break a torch for the CPU."""
    logging.getLogger("transformers.utils.import_utils").addFilter(not_about_torchvision)


def not_about_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()


@contextmanager
def without_bars() -> Iterator[None]:
    """Meanwhile diffusers and transformers show no bars of their own; those of a download stay as they are."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as of_transformers

    downloads = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    shown = [one for one in (of_diffusers, of_transformers) if one.is_progress_bar_enabled()]
    try:
        for one in shown:
            one.disable_progress_bar()  # transformers turns those of downloads off and on with its own
        downloads()
        yield
    finally:
        for one in shown:
            one.enable_progress_bar()
        downloads()

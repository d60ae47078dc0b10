"""Regions: each adapter heard in its own part of the picture.

delta   one pass: every adapter's change is multiplied by its mask at each layer's resolution; where the layer reads
        the prompt (attn2's keys and values), by the subject's own words
noise   one row for each region and one for the background: each predicts the whole picture with its adapter and its
        prompt alone, and the predictions are mixed by the masks. Costs more, and keeps two subjects of one class apart
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.base_model import TextConditions
from ..kernels.attention import split_heads
from .attention_maps import AttentionMaps
from .regions import Masks
from .unet_hook import Conductor, Forward, Gate, Voice, in_voices, worded

Isolation = Literal["delta", "noise"]
EMPTY = 1 / 255  # a background mask below this everywhere needs no row


@dataclass
class Regional:
    """What the U-Net's calls need to know; one for each batch of pictures.

    members  index of each region's adapter among the attached ones; the others are heard everywhere
    masks    None: found from the attention of the steps before `start`
    words    token positions of each subject in the picture's prompt; () where it does not name it
    texts    each region's own prompt, (1, tokens, d); None: the picture's prompt
    ground   the background's prompt; None: the picture's prompt
    start    share of the denoising steps before which all adapters are heard everywhere
    """

    isolate: Isolation
    members: Sequence[int]
    masks: Masks | None
    words: Sequence[Sequence[int]]
    texts: Sequence[TextConditions | None]
    ground: TextConditions | None = None
    start: float = 0.0
    together: bool = True
    maps: AttentionMaps | None = None

    def __call__(self, conductor: Conductor, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moment = conductor.moment
        assert moment is not None
        if moment.progress < self.start:
            conductor.gates = [None] * len(conductor.on)
            if self.maps is None:
                return forward(*args, **kwargs)
            if moment.step == 0:
                self.maps.clear()
                self.masks = None
            with self.maps.collecting(conductor):
                return forward(*args, **kwargs)
        if self.masks is None:
            assert self.maps is not None
            self.masks = self.maps.masks()
        if self.isolate == "noise":
            return self._noise(conductor, forward, args, kwargs, self.masks)
        return self._delta(conductor, forward, args, kwargs, self.masks)

    # --- noise

    def _noise(
        self, conductor: Conductor, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], masks: Masks
    ) -> Any:
        assert conductor.moment is not None
        everywhere = frozenset(range(len(conductor.on))) - frozenset(self.members)
        voices = [Voice(everywhere | {i}, text) for i, text in zip(self.members, self.texts, strict=True)]
        shares = masks.at(*conductor.moment.size)  # (N, P, h, w)
        ground = (1 - shares.sum(0, keepdim=True)).clamp(0, 1)
        if ground.max() > EMPTY:
            voices.append(Voice(everywhere, self.ground))
            shares = torch.cat([shares, ground])
        shares = shares / shares.sum(0, keepdim=True).clamp(min=1e-6)
        return in_voices(conductor, forward, args, kwargs, voices, shares, together=self.together)

    # --- delta

    def _delta(
        self, conductor: Conductor, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], masks: Masks
    ) -> Any:
        assert conductor.moment is not None
        prompted = [n for n, text in enumerate(self.texts) if text is not None]
        tokens = (args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]).shape[1]
        pictures = conductor.moment.pictures
        gates: list[Gate | None] = [None] * len(conductor.on)
        for n, member in enumerate(self.members):
            unowned, owned = self._word_gates(n, masks, tokens, prompted)
            rows = [unowned, owned] if conductor.moment.guided else [owned]
            words = torch.cat([part if len(part) == pictures else part.expand(pictures, -1) for part in rows])
            gates[member] = Gate(masks=masks, subject=n, words=words)
        conductor.gates = gates
        try:
            if not prompted:
                return forward(*args, **kwargs)
            voices = [Voice(frozenset(), self.texts[n]) for n in prompted]
            args, kwargs = beside(conductor, args, kwargs, voices)
            with own_words(conductor, masks, prompted, tokens):
                return forward(*args, **kwargs)
        finally:
            conductor.gates = [None] * len(conductor.on)

    def _word_gates(self, n: int, masks: Masks, tokens: int, prompted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(P, all tokens) for region n: rows of the negative prompt, and rows of the prompt.

        Its own words: 1. Another subject's: the share of that one's region that is also this one's. Words of nobody:
        the share of the picture. So equal regions give the plain sum, and one region without another the single adapter.
        """
        full = masks.full  # (N, P, H, W)
        mine = full[n]
        area = mine.mean((1, 2))  # (P,)
        own = (mine.amax((1, 2)) > 0).to(area)
        both = (full * mine).sum((2, 3))  # (N, P)
        theirs = full.sum((2, 3))
        overlap = torch.where(theirs > 0, both / theirs.clamp(min=1e-6), own)  # (N, P)
        unowned = area[:, None].repeat(1, tokens)
        owned = unowned.clone()
        for m, positions in enumerate(self.words):
            for position in positions:
                owned[:, position] = own if m == n else overlap[m]
        for m in prompted:
            part = (own if m == n else overlap[m])[:, None].repeat(1, tokens)
            owned, unowned = torch.cat([owned, part], 1), torch.cat([unowned, area[:, None].repeat(1, tokens)], 1)
        return unowned, owned


# --- prompts of regions within one pass ----------------------------------------------------------------------------


def beside(
    conductor: Conductor, args: tuple[Any, ...], kwargs: dict[str, Any], voices: Sequence[Voice]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with the voices' prompts behind the picture's own, along the tokens."""
    positional = len(args) > 2

    def states(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        return call[0][2] if positional else call[1]["encoder_hidden_states"]

    every = torch.cat([states((args, kwargs)), *(states(worded(conductor, args, kwargs, v)) for v in voices)], dim=1)
    if positional:
        return (*args[:2], every, *args[3:]), kwargs
    return args, kwargs | {"encoder_hidden_states": every}


@contextmanager
def own_words(conductor: Conductor, masks: Masks, prompted: Sequence[int], tokens: int) -> Iterator[None]:
    """attn2 of every transformer reads, at each pixel, the prompts of the regions that the pixel belongs to."""
    before = conductor.unet.attn_processors
    mine = RegionalAttention(conductor, masks, prompted, tokens)
    conductor.unet.set_attn_processor({k: mine if ".attn2." in k else p for k, p in before.items()})
    try:
        yield
    finally:
        conductor.unet.set_attn_processor(before)


class RegionalAttention:
    """Cross-attention to several prompts that lie one behind the other, mixed by masks."""

    def __init__(self, conductor: Conductor, masks: Masks, prompted: Sequence[int], tokens: int) -> None:
        self.conductor, self.masks, self.prompted, self.tokens = conductor, masks, prompted, tokens

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        rows, pixels, _width = hidden_states.shape
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key, value = (split_heads(f(encoder_hidden_states), attn.heads) for f in (attn.to_k, attn.to_v))
        shares = self._shares(rows).to(query.dtype)  # (1 + prompted, rows, pixels)
        mixed = torch.zeros_like(hidden_states)
        for part, share in enumerate(shares):
            span = slice(part * self.tokens, (part + 1) * self.tokens)
            seen = F.scaled_dot_product_attention(query, key[:, :, span], value[:, :, span], scale=attn.scale)
            mixed = mixed + share[:, :, None] * seen.transpose(1, 2).reshape(rows, pixels, -1)
        return attn.to_out[1](attn.to_out[0](mixed))

    def _shares(self, rows: int) -> Tensor:
        masks = self.masks.at(*self.conductor.size)[list(self.prompted)].flatten(2)  # (prompted, P, pixels)
        shares = torch.cat([(1 - masks.sum(0, keepdim=True)).clamp(0, 1), masks])
        shares = shares / shares.sum(0, keepdim=True).clamp(min=1e-6)
        return shares.repeat(1, rows // shares.shape[1], 1)

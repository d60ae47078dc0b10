"""Where the U-Net looks for each subject's words: masks found from the cross-attention of the first steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError
from ..kernels.attention import split_heads
from .regions import Masks, blurred

if TYPE_CHECKING:
    from .unet_hook import Conductor

MOST_PIXELS = 1024  # of a layer whose attention is read: finer layers say little of objects and cost much
COARSE = 16  # latents for each pixel of a layer that is read in any case: SDXL's coarsest has that many
SOFTNESS = 0.06  # of the masks' edges, as a share of the side


class AttentionMaps:
    """Mean attention to each subject's words, over heads, layers and steps.

    words  token positions of each subject in the picture's prompt
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.words = words
        self.clear()

    def clear(self) -> None:
        self.total: Tensor | None = None  # (N, P, side, side)
        self.queries: dict[int, Tensor] = {}

    @contextmanager
    def collecting(self, conductor: Conductor) -> Iterator[None]:
        from .unet_hook import hooked

        with ExitStack() as stack:
            for name, module in conductor.unet.named_modules():
                if name.endswith(".attn2"):
                    stack.enter_context(hooked(module.to_q.register_forward_hook(self._keep_query(module, conductor))))
                    stack.enter_context(hooked(module.to_k.register_forward_hook(self._look(module, conductor))))
            yield

    def _keep_query(self, attention: nn.Module, conductor: Conductor) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            assert conductor.moment is not None
            height, width = conductor.moment.size
            if output.shape[1] <= max(MOST_PIXELS, height * width // COARSE):
                self.queries[id(attention)] = output

        return keep

    def _look(self, attention: Any, conductor: Conductor) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Tensor) -> None:
            query = self.queries.pop(id(attention), None)
            if query is None:
                return
            moment = conductor.moment
            assert moment is not None
            first = moment.pictures if moment.guided else 0
            q, k = (split_heads(t[first:].float(), attention.heads) for t in (query, output))
            weights = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1).mean(1)  # (P, pixels, tokens)
            seen = torch.stack([weights[..., list(positions)].mean(-1) for positions in self.words])  # (N, P, pixels)
            maps = seen.reshape(*seen.shape[:2], *conductor.size)
            maps = maps / maps.mean((2, 3), keepdim=True).clamp(min=1e-8)
            side = max(moment.size)
            maps = F.interpolate(maps, (side, side), mode="bilinear")
            self.total = maps if self.total is None else self.total + maps

        return look

    def masks(self) -> Masks:
        """Each pixel belongs to the subject whose words it looks at most; soft edges."""
        if self.total is None:  # fused projections, or attention of another kind
            raise SettingsError("no attention could be read, so no regions are found; give regions=[Region(...)] with boxes")
        side = self.total.shape[-1]
        smooth = blurred(self.total, SOFTNESS * side)
        winner = smooth.argmax(0)  # (P, side, side)
        owned = torch.stack([(winner == n).float() for n in range(len(smooth))])
        return Masks(blurred(owned, SOFTNESS * side / 2).clamp(0, 1))

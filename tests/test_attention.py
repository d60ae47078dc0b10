"""The U-Net's attention: stock layers get the kernel that is asked for, which computes the same, and is put back."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from pipelines import base_of

from lora_booth.base.base_model import BaseModel
from lora_booth.kernels.attention import KERNELS, attention_kernel


class Own(AttnProcessor2_0):
    """A user's own."""


def forward(base: BaseModel, side: int = 8) -> torch.Tensor:
    text = base.encode_text(["a dog"])
    extra = {"text_embeds": text.pooled, "time_ids": torch.zeros(1, 6)} if base.family.time_ids else None
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    result: torch.Tensor = base.unet(latents, 7, text.states, added_cond_kwargs=extra).sample
    return result


def test_stock_layers_get_the_kernel_and_compute_the_same() -> None:
    base = base_of("sd1")
    base.unet.set_attn_processor(AttnProcessor())
    before = base.unet.attn_processors
    with torch.no_grad():
        expected = forward(base)
        with attention_kernel(base.unet, "sdpa") as own:
            assert {type(p) for p in base.unet.attn_processors.values()} == {AttnProcessor2_0} and not own
            assert torch.allclose(forward(base), expected, atol=1e-5)
    assert base.unet.attn_processors == before
    q, k, v = (torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 3, 3))
    heads = [x.view(2, -1, 2, 4).transpose(1, 2) for x in (q, k, v)]
    stored = (heads[0] @ heads[1].mT / 2).softmax(-1) @ heads[2]  # with all scores
    assert torch.allclose(KERNELS["sdpa"](q, k, v, 2), stored.transpose(1, 2).flatten(2))


def test_a_processor_of_the_users_own_stays_and_is_told() -> None:
    base = base_of("sd1")
    paths = list(base.unet.attn_processors)
    mine = Own()
    base.unet.set_attn_processor({path: mine if path == paths[0] else AttnProcessor() for path in paths})
    with pytest.raises(KeyboardInterrupt), attention_kernel(base.unet, "sdpa") as own:
        assert own == ["Own"]
        now = base.unet.attn_processors
        assert now[paths[0]] is mine and all(type(now[path]) is AttnProcessor2_0 for path in paths[1:])
        raise KeyboardInterrupt
    after = base.unet.attn_processors
    assert after[paths[0]] is mine and all(type(after[path]) is AttnProcessor for path in paths[1:])

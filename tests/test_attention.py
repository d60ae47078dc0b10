"""The U-Net's attention: the same by every kernel, chosen by a measurement that is remembered, and put back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from pipelines import KINDS, base_of

import lora_booth.kernels.attention as attention
from lora_booth.base.base_model import BaseModel
from lora_booth.cache import read_entry, write_entry
from lora_booth.kernels.attention import KERNELS, attention_kernel, attention_shapes, candidates, fastest_attention


class Own(AttnProcessor2_0):
    """A user's own."""


def forward(base: BaseModel, side: int = 8) -> torch.Tensor:
    text = base.encode_text(["a dog"])
    extra = {"text_embeds": text.pooled, "time_ids": torch.zeros(1, 6)} if base.family.time_ids else None
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    result: torch.Tensor = base.unet(latents, 7, text.states, added_cond_kwargs=extra).sample
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_that_the_unet_computes(kind: str) -> None:
    base = base_of(kind)
    seen: Counter[Any] = Counter()

    class Spy(AttnProcessor2_0):
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **more: Any) -> Any:
            keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            seen[attn.heads, hidden_states.shape[1], keys.shape[1], attn.inner_dim // attn.heads] += 1
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **more)

    for side in (8, 12):
        seen.clear()
        base.unet.set_attn_processor(Spy())
        with torch.no_grad():
            forward(base, side)
        assert attention_shapes(base, 8 * side) == seen and sum(seen.values()) >= 4


def test_every_kernel_computes_the_same_and_is_taken_out_again() -> None:
    base = base_of("sd1")
    with torch.no_grad():
        expected = forward(base)
        for name, kind in (("plain", AttnProcessor), ("sdpa", AttnProcessor2_0)):
            before = base.unet.attn_processors
            with attention_kernel(base.unet, name) as own:
                assert {type(p) for p in base.unet.attn_processors.values()} == {kind} and not own
                assert torch.allclose(forward(base), expected, atol=1e-5)
            assert base.unet.attn_processors == before
    q, k, v = (torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 3, 3))
    assert torch.allclose(KERNELS["plain"](q, k, v, 2), KERNELS["sdpa"](q, k, v, 2))


def test_a_processor_of_the_users_own_stays_and_is_told() -> None:
    base = base_of("sd1")
    paths = list(base.unet.attn_processors)
    mine = Own()
    base.unet.set_attn_processor({path: mine if path == paths[0] else AttnProcessor2_0() for path in paths})
    with pytest.raises(KeyboardInterrupt), attention_kernel(base.unet, "plain") as own:
        assert own == ["Own"]
        now = base.unet.attn_processors
        assert now[paths[0]] is mine and all(type(now[path]) is AttnProcessor for path in paths[1:])
        raise KeyboardInterrupt
    after = base.unet.attn_processors
    assert after[paths[0]] is mine and all(type(after[path]) is AttnProcessor2_0 for path in paths[1:])


def test_plain_attention_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("sd1")
    shapes = attention_shapes(base, 64)
    kept = 4 * sum(heads * queries * keys * count for (heads, queries, keys, _), count in shapes.items())
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * kept)
    assert candidates(base, shapes, 2) == ["sdpa", "plain"]
    assert candidates(base, shapes, 3) == ["sdpa"]


def test_a_choice_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BOOTH_CACHE", str(tmp_path))
    base = base_of("sd1")
    assert fastest_attention(base, resolution=64, pictures=2) == "sdpa"  # nothing to win
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(attention, "FEWEST_SCORES", 0)
    first = fastest_attention(base, resolution=64, pictures=2)
    (file,) = tmp_path.rglob("*.safetensors")
    seconds = read_entry("attention", file.stem)
    assert seconds is not None and set(seconds) == {"sdpa", "plain"} and all(0 < value < 60 for value in seconds.values())
    assert first in seconds
    for sdpa, expected in ((1.0, "sdpa"), (1.1, "sdpa"), (1.3, "plain")):  # what it has read, and not by a hair
        write_entry("attention", file.stem, {"sdpa": torch.tensor(sdpa), "plain": torch.tensor(1.0)})
        assert fastest_attention(base, resolution=64, pictures=2) == expected
    file.write_text("{")
    fastest_attention(base, resolution=64, pictures=2)
    assert set(read_entry("attention", file.stem) or {}) == {"sdpa", "plain"}
    fastest_attention(base, resolution=64, pictures=1)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2 and not list(tmp_path.rglob("*.tmp"))

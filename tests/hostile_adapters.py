"""Hostile adapter files, built by code, each with the error that loading it must raise."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from good_adapters import BOMB
from spoilt import put_together, saved
from torch import Tensor

from lora_booth import errors as E

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
V = Q.replace("to_q", "to_v")
KOHYA_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
D, U = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
KD, KU, KA = (f"{KOHYA_Q}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
META = "lora_adapter_metadata"


@dataclass(frozen=True)
class Hostile:
    name: str
    error: type[E.AdapterError]
    build: Callable[[Path], Path]  # into an empty folder; returns the path to load
    says: str = ""  # a part of the message


def pair(rank: int = 4, width: int = 16, out: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """down and up that fit to_q of the tiny SD 1.x pipeline."""
    g = torch.Generator().manual_seed(2)
    return torch.randn(rank, width, generator=g).to(dtype), torch.randn(out, rank, generator=g).to(dtype)


def written(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    return saved(folder / "hostile.safetensors", tensors, metadata)


def raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    path = folder / "hostile.safetensors"
    path.write_bytes(put_together(header, data, length=length))
    return path


def tensors(name: str, error: type[E.AdapterError], given: dict[str, Tensor], says: str = "", **metadata: str) -> Hostile:
    return Hostile(name, error, lambda folder: written(folder, given, metadata or None), says)


def header(
    name: str, error: type[E.AdapterError], given: Any, data: bytes = b"", length: int | None = None, says: str = ""
) -> Hostile:
    return Hostile(name, error, lambda folder: raw(folder, given, data, length), says)


def entry(name: str, error: type[E.AdapterError], data: bytes = b"0000", **changed: Any) -> Hostile:
    """One tensor whose entry in the header is changed."""
    return header(name, error, {KD: {**ONE, **changed}}, data)


def peft(name: str, error: type[E.AdapterError], says: str = "", **fields: Any) -> Hostile:
    down, up = pair()
    text = json.dumps({f"unet.{field}": value for field, value in fields.items()})
    return tensors(name, error, {D: down, U: up}, says, **{META: text})


# --- headers -------------------------------------------------------------------------------------------------------


def headers() -> list[Hostile]:
    form, large = E.AdapterFormatError, E.AdapterTooLarge
    two = {KD: ONE, KU: ONE}
    many = {f"k{i}": {**ONE, "data_offsets": [4 * i, 4 * i + 4]} for i in range(4097)}
    return [
        header("length longer than the file", form, {KD: ONE}, b"0000", 10**6),
        header("length 2^63", form, {KD: ONE}, b"0000", 2**63),
        header("length 2^64 - 1", form, {KD: ONE}, b"0000", 2**64 - 1),
        header("length ends inside the JSON", form, {KD: ONE}, b"0000", 20),
        header("length reaches into the tensors", form, {KD: ONE}, b"0000", len(json.dumps({KD: ONE})) + 2),
        header("length 0", form, {KD: ONE}, b"0000", 0),
        header("length 1", form, {KD: ONE}, b"0000", 1),
        header("trailing byte", form, {KD: ONE}, b"00000", says="trailing"),
        header("a megabyte behind the tensors", form, {KD: ONE}, b"0000" + b"MZ" * 2**19, says="trailing"),
        header("cut off", form, {KD: ONE}, b"000", says="cut off"),
        header("overlap", form, {KD: ONE, KU: {**ONE, "data_offsets": [2, 6]}}, b"000000", says="overlap"),
        header("the same bytes twice", form, two, b"0000", says="overlap"),
        header("hole", form, {KD: ONE, KU: {**ONE, "data_offsets": [5, 9]}}, b"0" * 9, says="hole"),
        header("hole at the start", form, {KD: {**ONE, "data_offsets": [1, 5]}}, b"0" * 5, says="hole"),
        entry("offsets backwards", form, data_offsets=[4, 0]),
        entry("offset below 0", form, data_offsets=[-4, 0]),
        entry("offset a float", form, data_offsets=[0.0, 4.0]),
        entry("offset infinite", form, data_offsets=[0, 1e999]),
        entry("offset a bool", form, data_offsets=[False, 4]),
        entry("offset a string", form, data_offsets=["0", "4"]),
        entry("offset 10^400", form, data_offsets=[0, 10**400]),
        entry("three offsets", form, data_offsets=[0, 2, 4]),
        entry("offsets a table", form, data_offsets={"0": 4}),
        entry("more bytes than the shape", form, b"0" * 8, data_offsets=[0, 8]),
        entry("shape [2^40, 0]", form, b"", shape=[2**40, 0], data_offsets=[0, 0]),
        entry("shape [0]", form, b"", shape=[0], data_offsets=[0, 0]),
        entry("shape [2^63]", form, shape=[2**63]),
        entry("shape whose product wraps to 1", form, shape=[2**32 + 1, 2**32 - 1]),
        entry("shape below 0", form, shape=[-1]),
        entry("shape a float", form, shape=[1.0]),
        entry("shape a bool", form, shape=[True]),
        entry("shape a string", form, shape="1"),
        entry("shape null", form, shape=None),
        entry("shape of 10,000 dimensions", form, shape=[1] * 10_000),
        entry("dtype unknown", E.AdapterDtypeError, dtype="Q4"),
        entry("dtype with escape codes", E.AdapterDtypeError, dtype="\x1b[2J\n"),
        entry("dtype a list", form, dtype=["F32"]),
        entry("an unknown field", form, more=1),
        header("an entry that is a list", form, {KD: []}, b"0000"),
        header("an entry without a shape", form, {KD: {"dtype": "F32", "data_offsets": [0, 4]}}, b"0000"),
        header("duplicate keys", form, f'{{"{KD}": {json.dumps(ONE)}, "{KD}": {json.dumps(ONE)}}}'.encode(), b"0000"),
        header("duplicate keys by an escape", form, b'{"a": 1, "\\u0061": 1}'),
        header("duplicate fields", form, b'{"a": {"dtype": "F32", "dtype": "F16"}}'),
        header("duplicate metadata", form, b'{"__metadata__": {}, "__metadata__": {}}'),
        header("metadata a list", form, {"__metadata__": [], KD: ONE}, b"0000"),
        header("metadata null", form, {"__metadata__": None, KD: ONE}, b"0000"),
        header("metadata a number", form, {"__metadata__": {"a": 1}, KD: ONE}, b"0000"),
        header("metadata nested", form, {"__metadata__": {"a": {"b": "c"}}, KD: ONE}, b"0000"),
        header("metadata of 3 MB in small pieces", large, {"__metadata__": {f"k{i}": "x" for i in range(300_000)}}),
        header("header of 5 MB", large, b"{" + b" " * (5 * 2**20) + b"}"),
        header("4,097 tensors", large, many, b"0" * 4 * 4097),
        header("60,000 tensors", large, {f"k{i}": ONE for i in range(60_000)}),
        header("a million tables", form, b'{"a": [' + b"{}," * 1_300_000 + b"{}]}"),
        header("a million lists", form, b'{"a": [' + b"[]," * 1_300_000 + b"[]]}"),
        header("lists 90,000 deep", form, b'{"a": ' + b"[" * 90_000, says="deep"),
        header("tables 90,000 deep", form, b'{"a":' * 90_000, says="deep"),
        header("a number of 5,000 digits", form, b'{"a": ' + b"9" * 5000 + b"}"),
        header("a million digits", form, b'{"a": ' + b"9" * 10**6 + b"}"),
        header("NaN", form, b'{"a": NaN}'),
        header("Infinity", form, b'{"a": -Infinity}'),
        header("not UTF-8", form, b'{"a": "\xff"}'),
        header("UTF-16", form, "{}".encode("utf-16-le")),
        header("a byte order mark", form, b"\xef\xbb\xbf{}"),
        header("a list", form, b"[1, 2]"),
        header("space before the brace", form, b" {}"),
        header("two objects", form, b"{}{}"),
        header("a comment", form, b"{/* */}"),
        header("single quotes", form, b"{'a': 1}"),
        header("zero bytes as padding", form, b"{}\x00\x00\x00"),
        header("no tensors", E.AdapterBaseMismatch, b"{}"),
        header("metadata alone", E.AdapterBaseMismatch, {"__metadata__": {"format": "pt"}}),
        *(header(f"tensor name {ascii(key)[:24]}", E.AdapterTargetError, {key: ONE}, b"0000") for key in BAD_NAMES),
        header("tensor name of 257 letters", form, {"x" * 257: ONE}, b"0000"),
        header("tensor name of none", form, {"": ONE}, b"0000"),
    ]


BAD_NAMES = (
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "a b",
    "line\nbreak",
    "nul\x00",
    "../../x",
    "a/b",
    "é",
    "lorа_unet",  # a Cyrillic letter  # noqa: RUF001
    "\u202egnp",
    "\ud800",
    "\u0661\u00b2.alpha",  # digits, but not ASCII's
    BOMB[:256],
)

# --- tensors -------------------------------------------------------------------------------------------------------


def values() -> list[Hostile]:
    down, up = pair()
    found = []
    for name, value in (("NaN", float("nan")), ("Inf", float("inf")), ("-Inf", float("-inf")), ("1e18", 1e18), ("-2e4", -2e4)):
        wrong = up.clone()
        wrong[3, 1] = value
        found.append(tensors(f"{name} in up", E.AdapterNonFinite, {KD: down, KU: wrong}))
        found.append(tensors(f"{name} in down", E.AdapterNonFinite, {KD: wrong.T, KU: up}))
    for name, alpha in (("1e30", 1e30), ("NaN", float("nan")), ("Inf", float("inf")), ("-65", -65.0), ("65", 65.0)):
        found.append(tensors(f"alpha {name}", E.AdapterScaleError, {KD: down, KU: up, KA: torch.tensor(alpha)}))
    return [
        *found,
        tensors("fp16 Inf", E.AdapterNonFinite, {KD: down.half() * 60000, KU: up.half()}),
        tensors("bf16 3e38", E.AdapterNonFinite, {KD: down.bfloat16(), KU: up.bfloat16() * 3e38}),
        tensors("alpha -4 x 2^40", E.AdapterScaleError, {KD: down, KU: up, KA: torch.tensor(-4 * 2**40)}),
        tensors("alpha of two", E.AdapterFormatError, {KD: down, KU: up, KA: torch.ones(2)}),
        tensors("alpha a matrix", E.AdapterFormatError, {KD: down, KU: up, KA: torch.ones(4, 4)}),
        tensors("alpha bool", E.AdapterDtypeError, {KD: down, KU: up, KA: torch.tensor(True)}),
        tensors("alpha int8", E.AdapterDtypeError, {KD: down, KU: up, KA: torch.tensor(4, dtype=torch.int8)}),
        *(
            tensors(f"{dtype}"[6:], E.AdapterDtypeError, {KD: down.to(dtype), KU: up})
            for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn)
        ),
        tensors("rank 17 of 16", E.AdapterTooLarge, dict(zip((KD, KU), pair(17), strict=True))),
        tensors("rank 513", E.AdapterTooLarge, dict(zip((KD, KU), pair(513, 600, 600), strict=True))),
        tensors("rank 20,000", E.AdapterTooLarge, {KD: torch.zeros(20_000, 16), KU: torch.zeros(16, 20_000)}),
        tensors("rank 40,000 x 1", E.AdapterTooLarge, {KD: torch.zeros(40_000, 1), KU: torch.zeros(1, 40_000)}),
        tensors("no up", E.AdapterIncomplete, {KD: down}),
        tensors("no down", E.AdapterIncomplete, {U: up}),
        tensors("alpha alone", E.AdapterIncomplete, {KA: torch.tensor(4.0)}),
        tensors("one pair whole, one half", E.AdapterIncomplete, {D: down, U: up, f"{V}.lora_A.weight": down}),
        tensors("ranks differ", E.AdapterIncomplete, {KD: down, KU: up[:, :3]}),
        tensors("down transposed", E.AdapterIncomplete, {KD: down.T, KU: up}),
        tensors("vectors", E.AdapterIncomplete, {KD: down[0], KU: up[0]}),
        tensors("numbers", E.AdapterIncomplete, {KD: torch.tensor(1.0), KU: torch.tensor(1.0)}),
        tensors("three dimensions", E.AdapterIncomplete, {KD: down[:, :, None], KU: up[:, :, None]}),
        tensors("kernel and no kernel", E.AdapterIncomplete, {KD: torch.ones(4, 8, 3, 3), KU: up}),
        tensors("a kernel in up", E.AdapterIncomplete, {KD: torch.ones(4, 8, 1, 1), KU: torch.ones(16, 4, 3, 3)}),
        tensors("kohya and PEFT, the same module", E.AdapterFormatError, {KD: down, KU: up, D: down, U: up}),
        tensors("one half kohya's, one half PEFT's", E.AdapterIncomplete, {KD: down, U: up}, "named differently"),
        tensors("two adapters' names", E.AdapterFormatError, {f"{Q}.lora_A.{x}.weight": down for x in "ab"}),
        tensors("names that differ in case", E.AdapterTargetError, {KD: down, KU: up, KD.upper(): down}),
        tensors("other widths than the base", E.AdapterBaseMismatch, dict(zip((KD, KU), pair(4, 320, 320), strict=True))),
        tensors(
            "a layer that the base lacks",
            E.AdapterBaseMismatch,
            {k.replace("_0_attn", "_1_attn"): v for k, v in ((KD, down), (KU, up))},
        ),
        tensors(
            "a component that the base lacks",
            E.AdapterBaseMismatch,
            {f"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{h}.weight": t for h, t in (("down", down), ("up", up))},
        ),
        tensors("for SDXL by its words", E.AdapterBaseMismatch, {KD: down, KU: up}, ss_base_model_version="sdxl_base_v1-0"),
        tensors("for SD 2 by its card", E.AdapterBaseMismatch, {KD: down, KU: up}, **{"lora_booth.card": '{"family": "sd2"}'}),
        tensors(
            "made for escape codes",
            E.AdapterBaseMismatch,
            {KD: down, KU: up},
            **{"lora_booth.card": json.dumps({"family": "sdxl", "title": "\x1b[2J\r\n", "base_model": "\x1b]0;x\x07\u2028"})},
        ),
    ]


# --- keys ----------------------------------------------------------------------------------------------------------

NOT_OURS = (  # keys of other kinds of model
    "transformer.blocks.0.attn.to_q.lora_A.weight",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
    "diffusion_model.lora_down.weight.x",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
    "lora_transformer_single_transformer_blocks_0_attn_to_k.lora_down.weight",
    "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
)
RARE_KEYS = (  # left out where there is more, refused alone
    "unet.conv_in.lora_A.weight",
    "unet.conv_out.lora_A.weight",
    "unet.time_embedding.linear_1.lora_A.weight",
    "unet.add_embedding.linear_2.lora_A.weight",
    "lora_unet_time_embedding_linear_1.lora_down.weight",
    "lora_unet_input_blocks_0_0.lora_down.weight",
    "lora_te2_text_projection.lora_down.weight",
)
WRONG_KEYS = (
    "text_encoder.text_model.embeddings.token_embedding.lora_A.weight",
    "vae.decoder.conv_in.lora_A.weight",
    "vae_encoder.lora_A.weight",
    "safety_checker.vision_model.lora_A.weight",
    "unet.unknown.lora_A.weight",
    "unet.down_blocks.00.attentions.0.proj_in.lora_A.weight",
    "unet.down_blocks.-1.attentions.0.proj_in.lora_A.weight".replace("-", "_"),
    "unet.down_blocks.99999.attentions.0.proj_in.lora_A.weight",
    "unet.down_blocks.#.attentions.0.proj_in.lora_A.weight",
    "unet.down_blocks.\u00b2.attentions.0.proj_in.lora_A.weight",
    "unet.down_blocks.0.attentions.0.proj_in.weight",
    "unet.down_blocks.0.attentions.0.norm.lora_A.weight",
    "unet.down_blocks.0.__class__.lora_A.weight",
    "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight.",
    "lora_unet_input_blocks_1_7_proj_in.lora_down.weight",
    "lora_unet_input_blocks_999999999999_1_proj_in.lora_down.weight",
    "lora_unet_middle_block_3_proj_in.lora_down.weight",
    "lora_unet_output_blocks_2_2_op.lora_down.weight",
    "lora_unet.lora_down.weight",
    "lora_unet_.lora_down.weight",
    "lora_unet_down_blocks_0_0_attn1_to_q.lora_down.weight",
    "LORA_UNET_DOWN_BLOCKS_0_ATTENTIONS_0_PROJ_IN.lora_down.weight",
    "weight",
    "alpha",
    ".alpha",
    "...",
    "." * 256,
    "lora_down.weight",
    "text_encoders.clip_x.transformer.text_model.encoder.layers.0.mlp.fc1.lora_down.weight",
    f"{Q.replace('to_q', 'to_out.1')}.lora_A.weight",
    f"{Q}.lora_B.bias",
    f"{Q}.lora_A",
    f"{KOHYA_Q}.lora_sideways.weight",
    f"{KOHYA_Q}.scalar",
    "1" * 250 + ".alpha",
    "_" * 250 + ".alpha",
    "lora_unet_" + "0_" * 120 + ".alpha",
)
KINDS = {  # other kinds of adapter: the kind that the message names -> the end of a key
    "DoRA": ("dora_scale", "lora_magnitude_vector.weight", "lora_magnitude_vector"),
    "IA3": ("on_input", "ia3_l"),
    "OFT": ("oft_blocks", "oft_diag", "oft_R.weight", "rescale"),
    "BOFT": ("boft_R", "boft_s"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    "full weight differences": ("diff", "diff_b"),
    "trained norm layers": ("w_norm", "b_norm"),
    "AdaLoRA": ("lora_E",),
    "VeRA": ("vera_lambda_b",),
    "LoHa": ("hada_t3",),
    "LoKr": ("lokr_t1",),
    "LoRA on token embeddings": ("lora_embedding_A",),
}


def keys() -> list[Hostile]:
    down, up = pair()
    good = {KD: down, KU: up}
    return [
        *(tensors(key[:60], E.AdapterBaseMismatch, {key: down}, "another kind of model") for key in NOT_OURS),
        *(tensors(f"key {key[:120]}", E.AdapterTargetError, {**good, key: down.clone()}) for key in WRONG_KEYS),
        *(tensors(f"nothing but {key}", E.AdapterTargetError, {key: down}, "rarely") for key in RARE_KEYS),
        *(
            tensors(f"{kind}: {end}", E.AdapterTargetError, {**good, f"{KOHYA_Q}.{end}": down.clone()}, kind)
            for kind, ends in KINDS.items()
            for end in ends
        ),
        tensors("bundle_emb", E.AdapterTargetError, {**good, "bundle_emb.sks.string_to_param.x": down}, "embedding"),
        tensors("learned token beside it", E.AdapterTargetError, {**good, "clip_l": torch.ones(1, 768)}),
        tensors(
            "nothing but learned tokens", E.AdapterTargetError, {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
        ),
        tensors(
            "a whole checkpoint",
            E.AdapterTargetError,
            {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3)},
        ),
    ]


# --- LoHa, LoKr, and a middle factor -------------------------------------------------------------------------------


def lycoris() -> list[Hostile]:
    def hada(rank: int, out: int, inner: int, stem: str = KOHYA_Q, **other: Tensor) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(3)
        parts = {f"hada_w{i}_a": torch.randn(out, rank, generator=g) for i in (1, 2)}
        parts |= {f"hada_w{i}_b": torch.randn(rank, inner, generator=g) for i in (1, 2)}
        return {f"{stem}.{role}": tensor for role, tensor in (parts | other).items()}

    def kron(**parts: Tensor) -> dict[str, Tensor]:
        return {f"{KOHYA_Q}.{role}": tensor for role, tensor in parts.items()}

    def middle(mid: Tensor) -> dict[str, Tensor]:
        down, up = pair()
        return {KD: down, KU: up, f"{KOHYA_Q}.lora_mid.weight": mid}

    inc, large, ones = E.AdapterIncomplete, E.AdapterTooLarge, torch.ones
    nan, huge = torch.full((16, 2), float("nan")), torch.full((16, 2), 9e3)
    low1, low2 = {"lokr_w1_a": ones(4, 1), "lokr_w1_b": ones(1, 4)}, {"lokr_w2_a": ones(4, 2), "lokr_w2_b": ones(2, 4)}
    infinite = {"lokr_w1": torch.full((4, 4), 5e3), "lokr_w2": torch.full((4, 4), 5e3)}
    swollen = {}  # a few MB that are 2 GB as LoRA
    for i in range(60):
        stem = f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn1_to_q"
        parts = {"lokr_w1": ones(22, 22), "lokr_w2_a": ones(400, 22), "lokr_w2_b": ones(22, 400)}
        swollen |= {f"{stem}.{role}": tensor for role, tensor in parts.items()}
    return [
        tensors("LoHa of rank 900", large, hada(30, 1000, 1000), "LoHa"),
        tensors("LoHa without a part", inc, {k: v for k, v in hada(2, 16, 16).items() if "w2_b" not in k}),
        tensors("LoHa with one core", inc, hada(2, 16, 16, hada_t1=ones(2, 2, 3, 3))),
        tensors("LoHa halves of two sizes", inc, hada(2, 16, 16, hada_w2_a=ones(15, 2))),
        tensors("LoHa halves that broadcast", inc, hada(2, 16, 16, hada_w2_a=ones(1, 2))),
        tensors("LoHa halves of two ranks", inc, hada(2, 16, 16, hada_w2_a=ones(16, 3), hada_w2_b=ones(3, 16))),
        tensors("LoHa of numbers", inc, {k: torch.tensor(1.0) for k in hada(2, 16, 16)}),
        tensors("LoHa of an odd kernel", inc, hada(2, 16, 16 * 9 + 1, CONV)),
        tensors("LoHa with NaN", E.AdapterNonFinite, hada(2, 16, 16, hada_w1_a=nan)),
        tensors("LoHa beyond the values", E.AdapterNonFinite, hada(2, 16, 16, hada_w1_a=huge, hada_w2_a=huge)),
        tensors("LoHa alpha 1e6", E.AdapterScaleError, hada(2, 16, 16, alpha=torch.tensor(1e6))),
        tensors("LoHa for another base", E.AdapterBaseMismatch, hada(2, 320, 320)),
        tensors("LoHa int8", E.AdapterDtypeError, {k: v.to(torch.int8) for k, v in hada(2, 16, 16).items()}),
        tensors("LoHa on a LoRA", inc, dict(zip((KD, KU), pair(), strict=True)) | hada(2, 16, 16)),
        tensors("LoKr of rank 1280", large, kron(lokr_w1=ones(8, 8), lokr_w2=ones(160, 160)), "LoKr"),
        tensors("LoKr that swells to 2 GB", large, swollen, "as LoRA"),
        tensors("LoKr without a part", inc, kron(lokr_w1=ones(4, 4), lokr_w2_a=ones(4, 2))),
        tensors("LoKr with a part twice", inc, kron(lokr_w1=ones(4, 4), lokr_w2=ones(4, 4), **low1)),
        tensors("LoKr of two ranks", inc, kron(**low1, **low2)),
        tensors("LoKr with a kernel in w1", inc, kron(lokr_w1=ones(4, 4, 3, 3), lokr_w2=ones(4, 4))),
        tensors("LoKr of vectors", inc, kron(lokr_w1=ones(4, 4), lokr_w2=ones(4))),
        tensors("LoKr beyond the values", E.AdapterNonFinite, kron(**infinite)),
        tensors("a middle factor alone", inc, {f"{KOHYA_Q}.lora_mid.weight": ones(4, 4, 3, 3)}),
        tensors("a middle factor of another rank", inc, middle(ones(3, 3, 3, 3))),
        tensors("a flat middle factor", inc, middle(ones(4, 4))),
        tensors("a middle factor on a linear layer", E.AdapterBaseMismatch, middle(ones(4, 4, 3, 3))),
    ]


# --- PEFT's configuration ------------------------------------------------------------------------------------------


def configurations() -> list[Hostile]:
    down, up = pair()
    zeros = {
        D: {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]},
        U: {"dtype": "F32", "shape": [16, 4], "data_offsets": [256, 512]},
    }

    def entry_text(name: str, text: str) -> Hostile:
        return tensors(name, E.AdapterFormatError, {D: down, U: up}, **{META: text})

    def folder(name: str, error: type[E.AdapterError], config: bytes) -> Hostile:
        def build(where: Path) -> Path:
            written(where, {D: down, U: up}).rename(where / "adapter_model.safetensors")
            (where / "adapter_config.json").write_bytes(config)
            return where

        return Hostile(name, error, build)

    return [
        peft("metadata r 10^9", E.AdapterTooLarge, r=10**9, lora_alpha=16),
        peft("metadata r of 4,000 digits", E.AdapterFormatError, r=10**4000),
        peft("metadata rank_pattern 10^9", E.AdapterTooLarge, r=4, rank_pattern={"to_q": 10**9}),
        peft("metadata r a string", E.AdapterFormatError, r="4"),
        peft("metadata r 0", E.AdapterFormatError, r=0),
        peft("metadata r true", E.AdapterFormatError, r=True),
        peft("metadata r 4.0", E.AdapterFormatError, r=4.0),
        peft("metadata rank_pattern of lists", E.AdapterFormatError, rank_pattern={"to_q": [4]}),
        peft("metadata alpha 1e30", E.AdapterScaleError, r=4, lora_alpha=1e30),
        peft("metadata alpha 10^4000", E.AdapterFormatError, r=4, lora_alpha=10**4000),
        peft("metadata alpha a string", E.AdapterScaleError, r=4, lora_alpha="16"),
        peft("metadata alpha a bool", E.AdapterScaleError, r=4, lora_alpha=True),
        peft("metadata alpha a list", E.AdapterScaleError, r=4, lora_alpha=[1] * 1000),
        peft("metadata alpha_pattern 1e9", E.AdapterScaleError, r=4, lora_alpha=4, alpha_pattern={"to_q": 1e9}),
        peft("metadata alpha_pattern a bomb", E.AdapterScaleError, "regular expression", r=4, alpha_pattern={BOMB: 4}),
        peft("metadata alpha_pattern escape codes", E.AdapterScaleError, r=4, alpha_pattern={"\x1b[2J": 4}),
        peft("metadata alpha_pattern a list", E.AdapterFormatError, r=4, alpha_pattern=["to_q"]),
        *(
            peft(f"metadata {start}", E.AdapterTargetError, "base was changed", init_lora_weights=start)
            for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga")
        ),
        peft("metadata use_dora", E.AdapterTargetError, "DoRA", use_dora=True),
        peft("metadata use_qalora", E.AdapterTargetError, use_qalora=True),
        peft("metadata alora", E.AdapterTargetError, alora_invocation_tokens=[1, 2]),
        entry_text("metadata not JSON", "{"),
        entry_text("metadata a list of settings", "[]"),
        entry_text("metadata not ASCII", '{"r": "é"}'),
        entry_text("metadata NaN", '{"unet.lora_alpha": NaN}'),
        header("metadata a lone surrogate", E.AdapterFormatError, {"__metadata__": {META: "\ud800"}, **zeros}, bytes(512)),
        entry_text("metadata deep", "[" * 30_000),
        entry_text("metadata twice r", '{"r": 4, "r": 5}'),
        folder("config of 2 MB", E.AdapterTooLarge, b" " * 2**21),
        folder("config deep", E.AdapterFormatError, b'{"a":' * 90_000),
        folder("config not UTF-8", E.AdapterFormatError, b"\xff\xfe"),
        folder("config empty", E.AdapterFormatError, b""),
        folder("config a pickle", E.AdapterFormatError, pickle.dumps({"r": 4})),
    ]


# --- what is not a file, or not this kind --------------------------------------------------------------------------


class RunsCode:
    """What a pickle can do: leave a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def places() -> list[Hostile]:
    def named(name: str, error: type[E.AdapterError], file: str, content: bytes, says: str = "") -> Hostile:
        def build(folder: Path) -> Path:
            (folder / file).write_bytes(content)
            return folder / file

        return Hostile(name, error, build, says)

    def poisoned(suffix: str, protocol: int) -> Callable[[Path], Path]:
        def build(folder: Path) -> Path:
            (folder / f"x{suffix}").write_bytes(pickle.dumps(RunsCode(folder / "ran"), protocol=protocol))
            return folder / f"x{suffix}"

        return build

    def zipped(folder: Path) -> Path:
        torch.save({"a": torch.ones(2)}, folder / "x.safetensors")
        return folder / "x.safetensors"

    def pickles_alone(folder: Path) -> Path:
        (folder / "adapter_model.bin").write_bytes(b"PK")
        return folder

    def other_names(folder: Path) -> Path:
        path = written(folder, dict(zip((KD, KU), pair(), strict=True)))
        path.with_name("another.safetensors").write_bytes(path.read_bytes())
        return folder

    def directory(folder: Path) -> Path:
        (folder / "adapter_model.safetensors").mkdir()
        return folder

    def fifo(folder: Path) -> Path:
        os.mkfifo(folder / "x.safetensors")
        return folder / "x.safetensors"

    def linked_fifo(folder: Path) -> Path:
        os.mkfifo(folder / "pipe")
        (folder / "x.safetensors").symlink_to(folder / "pipe")
        return folder / "x.safetensors"

    def loop(folder: Path) -> Path:
        (folder / "x.safetensors").symlink_to(folder / "x.safetensors")
        return folder / "x.safetensors"

    def loop_inside(folder: Path) -> Path:
        (folder / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")
        return folder

    def leads_out(folder: Path) -> Path:
        inner = folder / "adapter"
        inner.mkdir()
        written(folder, dict(zip((KD, KU), pair(), strict=True)))
        (inner / "adapter_model.safetensors").symlink_to(folder / "hostile.safetensors")
        return inner

    def config_leads_out(folder: Path) -> Path:
        inner = folder / "adapter"
        inner.mkdir()
        written(folder, dict(zip((D, U), pair(), strict=True))).rename(inner / "adapter_model.safetensors")
        (folder / "secret.json").write_text('{"password": "x"}')
        (inner / "adapter_config.json").symlink_to(Path("..") / "secret.json")
        return inner

    def sparse(folder: Path) -> Path:
        shapes = {KD: [2**14, 2**14], KU: [2**14, 2**14]}  # of F32: 1 GiB each
        header = {
            key: {"dtype": "F32", "shape": shape, "data_offsets": [i * 2**30, (i + 1) * 2**30]}
            for i, (key, shape) in enumerate(shapes.items())
        }
        with open(folder / "x.safetensors", "wb") as file:
            file.truncate(file.write(put_together(header)) + 2**31)
        return folder / "x.safetensors"

    def ugly_name(folder: Path) -> Path:
        path = folder / "\x1b[31mred\n\u202e.safetensors"
        path.write_bytes(b"x")
        return path

    def stray_bytes(folder: Path) -> Path:
        path = folder / os.fsdecode(b"\xff\xfe.safetensors")
        path.write_bytes(b"x")
        return path

    unsafe, form = E.UnsafeFormat, E.AdapterFormatError
    found = [
        *(
            Hostile(f"pickle {suffix}", unsafe, poisoned(suffix, 4))
            for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".PT")
        ),
        *(Hostile(f"pickle of protocol {p} under our name", unsafe, poisoned(".safetensors", p)) for p in (2, 3, 4, 5)),
        Hostile("pickle of protocol 0 under our name", form, poisoned(".safetensors", 0)),
        Hostile("torch.save under our name", unsafe, zipped),
        Hostile("a folder of pickles", unsafe, pickles_alone),
        Hostile("a folder of two files with other names", E.AdapterError, other_names, "name the adapter's file"),
        Hostile("an empty folder", E.AdapterError, lambda folder: folder),
        Hostile("a directory in the file's place", E.AdapterError, directory),
        Hostile("larger than 1 GiB", E.AdapterTooLarge, sparse),
        Hostile("not there", E.AdapterError, lambda folder: folder / "missing.safetensors", "check the name"),
        Hostile("a name with a zero byte", E.AdapterError, lambda folder: folder / "a\0b.safetensors"),
        Hostile("a name of 5,000 letters", E.AdapterError, lambda folder: folder / ("x" * 5000)),
        named("an empty file", form, "x.safetensors", b""),
        named("one byte", form, "x.safetensors", b"{"),
        named("eight zeros", form, "x.safetensors", b"\0" * 8),
        named("nine zeros", form, "x.safetensors", b"\0" * 9),
        named("a text", form, "x.safetensors", b"<html>404 not found</html>" * 10),
        named("a Git LFS pointer", form, "x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        named("a picture", form, "x.safetensors", b"\x89PNG\r\n\x1a\n" + b"\0" * 100),
        named("GGUF", form, "x.safetensors", b"GGUF" + b"\0" * 100),
    ]
    if sys.platform != "win32":
        found += [
            Hostile("a named pipe", E.AdapterError, fifo, "regular"),
            Hostile("a link to a named pipe", E.AdapterError, linked_fifo, "regular"),
            Hostile("a device", E.AdapterError, lambda _: Path("/dev/zero"), "regular"),
            Hostile("a terminal", E.AdapterError, lambda _: Path("/dev/tty")),
            Hostile("a link to itself", E.AdapterError, loop),
            Hostile("a link to itself in a folder", E.AdapterError, loop_inside),
            Hostile("a link out of the folder", E.UnsafePath, leads_out),
            Hostile("a configuration out of the folder", E.UnsafePath, config_leads_out),
            Hostile("escape codes in the file's name", form, ugly_name, "\\x1b[31mred\\n\\u202e"),
        ]
    if sys.platform == "linux":
        found.append(Hostile("stray bytes in the file's name", form, stray_bytes, "\\xff\\xfe"))
    return found


def hostile_files() -> list[Hostile]:
    return [*headers(), *values(), *keys(), *lycoris(), *configurations(), *places()]

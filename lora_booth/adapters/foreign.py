"""What a file is that cannot be read as an adapter, by the names of its tensors, so that the error can say it.

The marks are parts of names as diffusers, ComfyUI and kohya's tools write them, with `_` for dots and colons and before and
after the name, and `#` for numbers.
"""

from __future__ import annotations

from collections.abc import Collection

from ..base.families import labels
from ..base.weight_files import brief
from ..errors import AdapterBaseMismatch, AdapterError, AdapterTargetError

EMBEDDING, CHECKPOINT = "a textual inversion embedding, not LoRA", "a whole checkpoint, not an adapter"
BUNDLE = "an adapter with a bundled embedding"
NUMBERED = "LoRA in the first layout, with numbers for names"
FILES = {  # what else a file may be -> marks; the first that fits counts
    BUNDLE: ("_bundle_emb_",),
    CHECKPOINT: ("_model_diffusion_model_", "_cond_stage_model_", "_conditioner_embedders_"),
    "an AnimateDiff motion module, for video": ("_motion_modules_", "_temporal_transformer_"),
    "an IP-Adapter": ("_ip_adapter_", "_image_proj_", "_to_k_ip_", "_to_v_ip_"),
    "a ControlNet": ("_control_model_", "_controlnet_", "_input_hint_block_", "_zero_convs_#_", "_lllite_"),
    "a T2I-Adapter": ("_adapter_body_#_",),
    "a VAE": (
        *("_vae_", "_first_stage_model_", "_quant_conv_", "_encoder_conv_in_", "_decoder_conv_in_"),
        *("_encoder_down_#_", "_decoder_up_#_", "_encoder_down_blocks_#_", "_decoder_up_blocks_#_"),
    ),
    NUMBERED: ("_unet_#_down_", "_unet_#_up_", "_encoder_#_down_", "_encoder_#_up_"),
    EMBEDDING: ("_emb_params_", "_string_to_param_", "_<"),
    "a text encoder": ("_token_embedding_weight_", "_position_embedding_weight_", "_positional_embedding_"),
    "a whole U-Net, not an adapter": ("_resnets_#_norm1_weight_", "_transformer_blocks_#_norm1_weight_"),
}
SD = (  # marks of our own families, in which those of other models may occur
    *("_attentions_#_", "_resnets_#_", "_input_blocks_#_", "_middle_block_#_", "_output_blocks_#_", "_encoder_layers_#_"),
)
MODELS = {  # other models that have adapters -> marks
    "HiDream": ("_double_stream_blocks_#_", "_single_stream_blocks_#_"),
    "Chroma": ("_distilled_guidance_layer_",),
    "FLUX.2": ("_double_stream_modulation_", "_single_stream_modulation_", "_to_qkv_mlp_proj_"),
    "FLUX (or HunyuanVideo)": ("_double_blocks_#_", "_single_blocks_#_", "_single_transformer_blocks_#_"),
    "Stable Diffusion 3": ("_joint_blocks_#_", "_joint_transformer_blocks_#_"),
    "Stable Diffusion 3 or FLUX": ("_te3_", "_text_encoder_3_", "_t5xxl_", "_encoder_block_#_layer_#_"),
    "Stable Cascade": ("_lora_prior_",),
    "Krea 2": ("_txtfusion_", "_blocks_#_attn_gate_", "_blocks_#_attn_wq_"),
    "Qwen-Image": ("_img_mlp_", "_txt_mlp_", "_img_mod_", "_txt_mod_"),
    "Qwen-Image (or Stable Diffusion 3 or FLUX)": ("_transformer_blocks_#_attn_",),
    "Anima or Cosmos": (
        "_adaln_modulation_",
        *(f"_blocks_#_{kind}_attn_{name}_proj_" for kind in ("self", "cross") for name in ("q", "k", "v", "output")),
    ),
    "Z-Image or Lumina": ("_noise_refiner_#_", "_context_refiner_#_", "_layers_#_attention_", "_layers_#_feed_forward_"),
    "Wan, a video model": ("_blocks_#_self_attn_", "_blocks_#_cross_attn_", "_blocks_#_ffn_"),
    "a video model such as LTX-Video, CogVideoX or Wan": ("_blocks_#_attn1_", "_blocks_#_attn2_"),
    "a language model": ("_layers_#_self_attn_", "_layers_#_mlp_", "_transformer_h_#_", "_language_model_"),
    "another model": ("_transformer_", "_diffusion_model_", "_lora_unet_blocks_#_", "_transformer_blocks_#_"),
}
KINDS = {  # a part of a key (with a `_` at its end: how the part begins) -> a kind of adapter without LoRA factors
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "on_input": "IA3",
    "ia3_": "IA3",
    "lora_embedding_": "LoRA on token embeddings",
    "oft_": "OFT",
    "boft_": "BOFT",
    "rescale": "OFT",
    **dict.fromkeys(("a1", "a2", "b1", "b2", "bm"), "GLoRA"),
    "lora_E": "AdaLoRA",
    "vera_": "VeRA",
    "w_norm": "trained norm layers",
    "b_norm": "trained norm layers",
    "diff": "full weight differences",
    "diff_b": "full weight differences",
}
NO_FACTORS = "only LoRA, and LoHa and LoKr of low rank, can be read; ask for a LoRA of it"
REMEDIES = {
    CHECKPOINT: "it is a base; BaseModel.load reads those of Stable Diffusion",
    EMBEDDING: "diffusers reads it by load_textual_inversion",
    "DoRA": "its change depends on the weights of its base and has no low rank; merge it into its base with the tool that "
    "made it, or ask for a plain LoRA",
    NUMBERED: "few programs ever read it; ask for a file of kohya's or diffusers' tools",
    BUNDLE: "learned tokens belong in a separate file; ask for the file without it",
}


def refusal(keys: Collection[str], *, alone: bool, path: object) -> AdapterError:
    """Why a file cannot be read.

    keys   names of tensors that are not LoRA of a module that adapters change
    alone  whether it has no others
    """
    first = brief(next(iter(keys)))
    names = [marked(key) for key in keys]
    tokens = alone and not any(end in key for key in keys for end in (".", ":", "lora"))  # a token's vectors by its name
    what = EMBEDDING if tokens or {"clip_l", "clip_g"} & set(keys) else found(names, FILES)
    if what is not None:
        what = BUNDLE if what == EMBEDDING and not alone else what
        remedy = REMEDIES.get(what, f"only adapters for {labels()} can be read here")
        return AdapterTargetError(f"{what} ({first}); {remedy}", path)
    if model := found([name for name in names if not any(mark in name for mark in SD)], MODELS):
        return AdapterBaseMismatch(
            f"made for {model}, another kind of model than {labels()}; its keys begin as {first[:60]!r}", path
        )
    for key in keys:
        for piece in key.split("."):
            for mark, kind in KINDS.items():
                if piece.startswith(mark) if mark.endswith("_") else piece == mark:
                    return AdapterTargetError(f"{brief(key)} is {kind}; {REMEDIES.get(kind, NO_FACTORS)}", path)
    return AdapterTargetError(f"{first} is not a LoRA tensor of a module that adapters change", path)


def marked(key: str) -> str:
    words = key.replace(".", "_").replace(":", "_").split("_")
    return f"_{'_'.join('#' if word.isdigit() else word for word in words)}_"


def found(names: Collection[str], table: dict[str, tuple[str, ...]]) -> str | None:
    return next((what for what, marks in table.items() if any(mark in name for name in names for mark in marks)), None)

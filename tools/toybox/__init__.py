"""Make the toybox base from nothing: `python -m tools.toybox --work DIR`.

Stages, each resumable (run the same command again) and each on the renders of `world.py` only:

    vae      AutoencoderKL, pictures <-> latents
    judge    the network that reads class, context, colours, pattern and accessory off a picture
    text     tokenizer and CLIPTextModel: which words belong together
    unet     CLIPTextModel and UNet2DConditionModel, text -> latents
    export   all as a stock StableDiffusionPipeline folder plus the judge, fp16

On two CPU cores: see `benchmarks/RESULTS.md`. With CUDA it takes minutes.
"""

"""The embedded base: a drawn world, a tiny Stable Diffusion pipeline trained on it, and its judge."""

RARE_TOKENS = ("sks", "zwx", "qlo", "vrn", "xjk", "ohwx")  # in the vocabulary, never in a training caption

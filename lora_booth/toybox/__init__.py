"""The embedded base: a drawn world, a tiny Stable Diffusion pipeline trained on it, and its judge."""

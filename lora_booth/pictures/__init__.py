"""Pictures: Composition, prompts, grids, gallery, recipes."""

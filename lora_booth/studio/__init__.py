"""The studio: a local page over a folder of plain files. `lora-booth studio` starts it; docs/studio.md describes it."""

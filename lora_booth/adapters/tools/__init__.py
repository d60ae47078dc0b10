"""Tools on adapters: merge, resize, difference, convert, extract, bake."""

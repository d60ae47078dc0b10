"""Adapter and its file: layouts, reading, writing, checks, what other programs read."""

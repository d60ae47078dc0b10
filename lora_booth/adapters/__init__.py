"""Adapters: LoRA factors and their card, read from and written to one safetensors file."""

from .adapter import Adapter, Card, LoraFactors

__all__ = ["Adapter", "Card", "LoraFactors"]

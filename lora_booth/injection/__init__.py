"""Adapters in a pipeline's modules, to train or to use, and out again without a trace."""

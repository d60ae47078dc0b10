"""Runs from start to finish: of one subject, of many."""

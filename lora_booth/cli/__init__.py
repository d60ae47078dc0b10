"""The command line: every command is one call into the API. Exit code 2 and one plain line for a user's mistake."""

from . import training, many, evaluation, pictures, adapters, studio, serve  # isort: skip  # in the order of the help
from .app import app, main

__all__ = ["adapters", "app", "evaluation", "main", "many", "pictures", "serve", "studio", "training"]

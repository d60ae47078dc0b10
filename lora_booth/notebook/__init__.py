"""Functions for the cells of docs/notebooks/dreambooth.ipynb; all of them also work without widgets."""

from .outputs import compare, judge, loss_curve, page, playground, samples, sheet, watch
from .session import begin, download, minutes_left, storage, upload

__all__ = ["begin", "compare", "download", "judge", "loss_curve", "minutes_left", "page", "playground", "samples", "sheet"]
__all__ += ["storage", "upload", "watch"]

"""The report of a run: one self-contained page in its folder."""

from .report import keep_crop, try_report, write_report

__all__ = ["keep_crop", "try_report", "write_report"]

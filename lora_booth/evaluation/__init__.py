"""How well adapters know their subject: DreamBooth's protocol with DINO and CLIP, or with the toybox's judge."""

from .protocol import Candidate, evaluate
from .results import Comparison, Metric, Row
from .runs import candidates_of, scores_file
from .statistics import Score
from .toybox import Evaluation, Scores, evaluate_subject

__all__ = [
    "Candidate",
    "Comparison",
    "Evaluation",
    "Metric",
    "Row",
    "Score",
    "Scores",
    "candidates_of",
    "evaluate",
    "evaluate_subject",
    "scores_file",
]

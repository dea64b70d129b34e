"""What a prediction returns: one small type per kind of task, each with ``to_json()``."""
from dataclasses import asdict, dataclass
from typing import Dict, List, Optional


class _Result:
    def to_json(self):
        """Plain Python, ready for ``json.dumps``."""
        return asdict(self)


@dataclass(frozen=True)
class Classified(_Result):
    """The most probable class; ``probabilities`` of the best ones sum to at most 1."""

    label: str
    probability: float
    probabilities: Dict[str, float]


@dataclass(frozen=True)
class Answered(_Result):
    """The answer to a question; ``candidates`` have independent probabilities (a question can have several right answers)."""

    answer: str
    probability: float
    candidates: Dict[str, float]


@dataclass(frozen=True)
class Scored(_Result):
    """A graded similarity, 0 to 5 for STS-B."""

    score: float


@dataclass(frozen=True)
class Captioned(_Result):
    """A caption, its score (log-probability, in beam search divided by the length penalty) and what else the search kept."""

    caption: str
    score: float
    others: List[str]


@dataclass(frozen=True)
class Written(_Result):
    """A generated text, its score and what else the search kept, as in ``Captioned``."""

    text: str
    score: float
    others: List[str]


@dataclass(frozen=True)
class Matched(_Result):
    """How well a picture and a sentence fit: ``score`` ranks (matching logit + weighted contrastive score), ``probability`` is that of
    the matching head, ``contrastive`` the product of the two features. UNIMO has one score, which is no probability, and nothing else."""

    score: float
    probability: Optional[float] = None
    contrastive: Optional[float] = None


@dataclass(frozen=True)
class Found(_Result):
    """One item of an index (a picture file or a sentence) with its score for the query, and its number in the index."""

    item: str
    score: float
    contrastive: float
    place: int = -1

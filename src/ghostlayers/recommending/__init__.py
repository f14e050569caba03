"""The best cut of a model for every engine: a comparison with its choices made for the reader."""

from ghostlayers.recommending.answer import Recommendation, recommend
from ghostlayers.recommending.wish import Wish

__all__ = ["Recommendation", "Wish", "recommend"]

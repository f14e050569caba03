"""One sentence for every repair and selection, for a reader who has not read the code."""

from collections.abc import Sequence

from ghostlayers.errors import RecipeError
from ghostlayers.repairs import find_method
from ghostlayers.repairs.auto import AUTO
from ghostlayers.report.summary import HEALED
from ghostlayers.selection.methods import find_selection
from ghostlayers.statistics.losses import DRAFTED

WORDS = {
    "boundary": "The residual stream between two layers; boundary b enters layer b.",
    "excess loss": "Loss above the dense model's, in nats a token; 0 would be a perfect repair.",
    "of Ghost's": "A model's excess loss divided by Ghost's on the same cut; below 100% is "
    "better than Ghost.",
    "KL": "How far the predicted distribution is from the dense model's, in nats a token.",
    "kept as a draft": "Share of tokens that the dense model keeps where this one drafts them in "
    "speculative decoding: the mean overlap of both predictions.",
    "tokens a verification": f"What a pass of the dense model gives behind {DRAFTED} drafted "
    "tokens, if each is kept with that chance.",
    "gate": "What goes into the activation of an MLP.",
    "stock checkpoint": "The repair lives in ordinary weights: any engine that runs the base "
    "model runs it. A custom one needs the code that travels with it.",
    "massive activation": "A token whose norm is more than 20 times the median there; no linear "
    "map can create one.",
    "residual": "Of a span: what the best linear map misses of the stream behind it, squared and "
    "relative to each token.",
    "Pareto front": "The models that no other beats in both directions.",
}


def explain_repair(name: str) -> str:
    """What a repair does, its arguments included; empty for an unknown one."""
    if name == "dense":
        return "The original model, nothing removed."
    if name.endswith(HEALED):
        before = explain_repair(name.removesuffix(HEALED))
        return f"{before} Then trained for the budget against the dense model.".strip()
    if name.split(":")[0] == AUTO:
        return "The repair that held-out windows chose on each cut; its gaps name it."
    try:
        return find_method(name).explain()
    except RecipeError:
        return ""


def explain_selection(name: str) -> str:
    """How a selection chooses; empty for an unknown one."""
    try:
        return find_selection(name.split(":")[0]).what
    except RecipeError:
        return ""


def explain(repairs: Sequence[str], selections: Sequence[str]) -> dict[str, dict[str, str]]:
    """What the names of a comparison mean, and the words of its page, by heading."""
    known = {
        "Repairs": {name: explain_repair(name) for name in ("dense", *repairs)},
        "Selections": {name: explain_selection(name) for name in selections},
        "Words": WORDS,
    }
    return {
        heading: {term: text for term, text in terms.items() if text}
        for heading, terms in known.items()
    }

"""One sentence for every repair and selection, for a reader who has not read the code."""

from collections.abc import Sequence

REPAIRS = {
    "dense": "The original model, nothing removed.",
    "none": "The layers are gone and nothing is done about it.",
    "magnitude": "Prune&Comp: one number rescales the whole stream, folded into weights.",
    "linearpatch-diag": "LinearPatch: one scale for each channel.",
    "linearpatch-hadamard": "LinearPatch: one scale for each channel of a Hadamard-rotated stream.",
    "diagonal": "The best diagonal operator by least squares.",
    "hadamard": "The best diagonal in the Hadamard basis by least squares.",
    "symmetric": "The best symmetric operator by least squares.",
    "procrustes": "The best rotation, with one scale.",
    "replaceme": "ReplaceMe: a linear map of the last kept MLP's output, folded into its weights.",
    "refit": "A new output projection for the last kept MLP (refit:3: for the last three).",
    "ghost": "Ghosted Layers: the best unconstrained linear map of the stream.",
    "normed": "A linear map of the normalised stream, added to the stream.",
    "joint": "One regression on several features at once, named behind the colon.",
    "piecewise": "Several Ghost operators, each for the tokens of one group.",
}

ARGUMENTS = {
    "affine": "with a constant",
    "rank": "with an operator of limited rank",
    "ridge": "with another ridge; auto chooses it on held-out tokens",
    "cosine": "fitted to cosine similarity instead of squares",
    "cosine-from-ls": "descended from least squares on the cosine of the whole stream",
    "accurate": "on the whole stream",
    "mean": "a mean of ratios of single windows, or a ratio of means",
    "per": "one operator for every removed layer where these lie apart",
}

FEATURES = {
    "x": "the stream",
    "m": "the last kept MLP's output",
    "z": "the last kept MLP's hidden activations",
    "o": "the last kept layer's attention output",
    "norm": "the normalised stream",
    "phi": "the first removed MLP's hidden activations",
}

SELECTIONS = {
    "streamline": "the contiguous span whose two ends are most alike (cosine), as LLM-Streamline",
    "shortgpt": "the layers that change the stream least (Block Influence), anywhere",
    "angular": "the span of smallest angle at the last token of each window",
    "perplexity": "greedily, the layer whose removal costs the least loss",
    "recoverable": "spans shortlisted by cosine and by what a linear repair leaves, the loss "
    "after the repair deciding",
    "residual": "the span that a linear repair mends best",
    "lorp": "the most redundant layers of clusters of alike layers",
}

WORDS = {
    "boundary": "The residual stream between two layers; boundary b enters layer b.",
    "excess loss": "Loss above the dense model's, in nats a token; 0 would be a perfect repair.",
    "of Ghost's": "A model's excess loss divided by Ghost's on the same cut; below 100% is "
    "better than Ghost.",
    "KL": "How far the predicted distribution is from the dense model's, in nats a token.",
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
    base, *parts = name.split(":")
    text = REPAIRS.get(base, "")
    if base == "joint" and parts:
        known = [FEATURES.get(feature, feature) for feature in parts[0].split("+")]
        return f"One regression on {_listed(known)}."
    if base == "piecewise" and parts:
        return f"{parts[0]} Ghost operators, each for the tokens of one group."
    notes = [ARGUMENTS[part.split("=")[0]] for part in parts if part.split("=")[0] in ARGUMENTS]
    return f"{text.removesuffix('.')}, {', '.join(notes)}." if text and notes else text


def explain_selection(name: str) -> str:
    """How a selection chooses; empty for an unknown one."""
    return SELECTIONS.get(name.split(":")[0], "")


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


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"

"""What a checkpoint says of itself: provenance as plain values."""

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ghostlayers.model.dense import BaseModel
from ghostlayers.recipe import Recipe
from ghostlayers.recipe.decision import Decision
from ghostlayers.repairs import Repair
from ghostlayers.runtime.files import shown_name
from ghostlayers.selection import ScoreTable
from ghostlayers.spans import Span, kept_layers, removed_layers
from ghostlayers.statistics.losses import LossSums
from ghostlayers.text.corpora import Corpus
from ghostlayers.text.tokens import Windows


def make_record(
    *,
    base: BaseModel,
    recipe: Recipe,
    corpus: Corpus,
    windows: Windows,
    spans: Sequence[Span],
    num_layers: int,
    repairs: Mapping[Span, Repair],
    table: ScoreTable | None,
    evidence: Mapping[str, LossSums],
    measured_on: tuple[str, Windows],
    versions: Mapping[str, str],
    decision: Decision | None = None,
) -> dict[str, Any]:
    """The record of a pruned model.

    ``measured_on`` names the text of the evidence, and gives its windows; ``decision`` is how a
    budget came to the number of layers.
    """
    return {
        "base_model": {
            "name": base.name,
            "title": base.title,
            "on_hub": base.on_hub,
            "revision": base.revision,
            "licence": base.licence,
            "quantized": base.quantized,
        },
        "cut": {
            "removed": removed_layers(spans),
            "kept": kept_layers(spans, num_layers),
            "spans": [[span.start, span.stop] for span in spans],
        },
        "repairs": [repair_row(span, repair) for span, repair in repairs.items()],
        "evidence": [evidence_row(name, sums) for name, sums in evidence.items()],
        "evidence_text": _text(*measured_on),
        "scores": None if table is None else table_to_dict(table),
        "recipe": recipe.to_dict(),
        "budget": None if decision is None else decision.to_dict(),
        "calibration": _calibration(recipe, corpus, windows),
        "versions": dict(versions),
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def repair_row(span: Span, repair: Repair) -> dict[str, Any]:
    """What the fit of one gap says about itself, as plain values."""
    return {
        "span": [span.start, span.stop],
        "method": repair.method,
        "num_tokens": repair.num_tokens,
        "relative_residual": repair.relative_residual,
        "condition_number": repair.condition_number,
        "ridge": repair.ridge,
    }


def packed_text(packed: Mapping[str, Any]) -> str:
    """What of a checkpoint stayed packed and what is plain, in two sentences."""
    plain = packed["plain"]
    changed = f"{len(plain)} that a repair changed ({', '.join(plain[:3])}"
    changed += f" and {len(plain) - 3} more)" if len(plain) > 3 else ")"
    beside = "embeddings, norms and operators"
    return (
        f"{packed['weights']} weights are packed as {packed['method']}, byte for byte as in the "
        f"base ({packed['packed_bytes'] / 1e6:,.1f} MB). Plain are "
        f"{f'{changed}, {beside}' if plain else beside} ({packed['plain_bytes'] / 1e6:,.1f} MB)."
    )


def base_title(base: Mapping[str, Any]) -> str:
    """What to call the base model of a record: its title, or its name without where it lay."""
    return str(base.get("title") or shown_name(base["name"]))


def _text(corpus: str, windows: Windows) -> dict[str, Any]:
    return {
        "corpus": corpus,
        "windows": len(windows),
        "sequence_length": windows.sequence_length,
        "bos": windows.describe_bos(),
    }


def evidence_row(name: str, sums: LossSums) -> dict[str, Any]:
    """Losses of one model as plain values."""
    perplexity = math.exp(min(sums.loss_nats, 700.0))
    return {"model": name, **sums.to_dict(), "perplexity": perplexity}


def _calibration(recipe: Recipe, corpus: Corpus, windows: Windows) -> dict[str, Any]:
    return {
        "corpus": corpus.name,
        "source": corpus.source,
        "sha256": corpus.sha256(),
        "complete": corpus.complete,
        "windows": recipe.windows,
        "fit_windows": recipe.num_fit_windows,
        "held_out_windows": recipe.num_held_out_windows,
        "sequence_length": windows.sequence_length,
        "bos": windows.describe_bos(),
        "documents": list(windows.documents),
    }


def table_to_dict(table: ScoreTable) -> dict[str, Any]:
    """A score table as plain values."""
    return {
        "num_layers": table.num_layers,
        "block_influence": list(table.block_influence),
        "similarity": table.similarity.tolist(),
        "angular_distance": None if table.angular is None else table.angular.tolist(),
        "importance": [None if math.isinf(value) else value for value in table.importance] or None,
        "steps": [{"layer": step.layer, "loss_nats": step.loss} for step in table.steps],
        "median_norm": table.norms.median(),
        "largest_norm": table.norms.largest(),
        "dense_loss_nats": table.dense_loss,
        "scattered": None
        if table.scattered is None
        else {
            "layers": list(table.scattered.layers),
            "loss_nats": table.scattered.loss,
            "behind_nats": table.scattered.behind,
            "behind_error": table.scattered.behind_error,
            "finished": table.scattered.finished,
        },
        "num_loss_tokens": table.num_loss_tokens,
        "spans": [
            {
                "start": score.span.start,
                "stop": score.span.stop,
                "cosine": score.cosine,
                "angular_distance": score.angular,
                "residual": score.residual,
                "loss_nats": score.loss,
                "loss_tokens": score.loss_tokens,
                "behind_nats": score.behind if score.loss is not None else None,
                "behind_error": score.behind_error if score.loss is not None else None,
                "finished": score.finished,
                "massive_activation_born": score.birth,
            }
            for score in table.spans
        ],
    }

"""What a healed checkpoint says of its training, as plain values."""

import datetime
from collections.abc import Mapping
from typing import Any

from ghostlayers.checkpoint.record import evidence_row
from ghostlayers.healing.outcome import Outcome
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.runtime.machine import processor_name, versions


def healing_row(recipe: HealingRecipe, outcome: Outcome) -> dict[str, Any]:
    """What was trained, on what, for how long, and what it came to."""
    text = outcome.text
    measured = {"dense": outcome.dense, "before": outcome.start, "healed": outcome.end}
    return {
        "trained": list(outcome.parts),
        "num_trained": outcome.num_trained,
        "tokens": text.num_tokens,
        "steps": outcome.steps,
        "step_tokens": outcome.step_tokens,
        "positions": outcome.share,
        "learning_rates": dict(outcome.rates),
        "best_step": outcome.best_step,
        "seconds": round(outcome.seconds, 1),
        "processor": processor_name(),
        "corpora": [
            {
                "corpus": corpus.name,
                "source": corpus.source,
                "sha256": corpus.sha256(),
                "share": share,
                "repeats": round(times, 3),
            }
            for corpus, share, times in zip(text.corpora, text.shares, text.repeats, strict=True)
        ],
        "documents": list(text.documents),
        "held_out": {
            "corpus": text.held_out_name,
            "windows": len(text.held_out),
            "sequence_length": text.held_out.sequence_length,
            "bos": text.held_out.describe_bos(),
            "of_another_text": text.other,
        },
        "evidence": [evidence_row(name, sums) for name, sums in measured.items()],
        "looks": [
            {"step": look.step, "seconds": round(look.seconds, 1), **look.losses.to_dict()}
            for look in outcome.looks
        ],
        "training_losses": list(outcome.training_losses),
        "recipe": recipe.to_dict(),
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def with_healing(record: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A record with one more training in it; those before stay."""
    before = [
        *record.get("healed_before", ()),
        *([record["healing"]] if "healing" in record else ()),
    ]
    changed = {k: v for k, v in record.items() if k not in ("files", "verification", "packed")}
    return {**changed, "healing": dict(row), **({"healed_before": before} if before else {})}

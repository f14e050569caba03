"""Scores, cuts and what they cost, on the screen."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ghostlayers.checkpoint.record import evidence_row
from ghostlayers.cli.screen import (
    Part,
    bold,
    dim,
    good,
    loss_cells,
    plain,
    say,
    show_decision,
    table,
    warn,
)
from ghostlayers.errors import GhostlayersError
from ghostlayers.pruned import PrunedModel
from ghostlayers.repairs import find_method
from ghostlayers.runtime.files import shown_name
from ghostlayers.selection import ScoreTable, SpanScore
from ghostlayers.selection.births import GROWTH, MASSIVE
from ghostlayers.selection.choices import shortlist
from ghostlayers.spans import Span, format_layers


def show_cut(pruned: PrunedModel) -> None:
    """The removed and the kept layers, and what to beware of."""
    say(
        "Removed: layers ",
        bold(format_layers(pruned.removed)),
        f" ({len(pruned.removed)} of {pruned.num_layers}; counted from 0, ends included)",
    )
    say("Kept:    layers ", bold(format_layers(pruned.kept)))
    for span in pruned.births:
        warn_birth(span)


def warn_birth(span: Span) -> None:
    """A massive activation is born inside a removed span."""
    warn(
        f"a massive activation is born inside the removed layers {format_layers(span.layers)}: "
        f"some tokens grow to more than {MASSIVE:g} times the median norm there, which a linear "
        "repair imitates badly. Try another span (ghostlayers score shows them all)."
    )


def show_losses(pruned: PrunedModel) -> None:
    """Losses of the dense, the cut and the repaired model on held-out calibration windows."""
    if not pruned.evidence:
        return
    rows = []
    for name, sums in pruned.evidence.items():
        row = evidence_row(name, sums)
        label = f"{name} ({pruned.recipe.repair})" if name == "repaired" else name
        rows.append([label, *loss_cells(row)])
    text = pruned.record["evidence_text"]
    table(
        ("", "loss", "perplexity", "KL to dense", "agreement"),
        rows,
        f"On {text['windows']} held-out windows of {text['sequence_length']} tokens of "
        f"{shown_name(str(text['corpus']))} ({text['bos']})",
    )
    repaired, cut = pruned.evidence.get("repaired"), pruned.evidence["cut"]
    if repaired is not None and repaired.loss_nats >= cut.loss_nats:
        tokens = max((repair.num_tokens for repair in pruned.repairs.values()), default=0)
        advice = _damped(str(pruned.recipe.repair))
        warn(
            f"the repair makes this cut worse than no repair at all on held-out text "
            f"({repaired.loss_nats:.3f} against {cut.loss_nats:.3f} nats). It was fitted on "
            f"{tokens:,} tokens: give it more (--fit-windows){advice}, or "
            "remove other layers."
        )


def _damped(repair: str) -> str:
    """Advice to let held-out tokens choose the damping of a repair that can."""
    try:
        find_method(f"{repair}:ridge=auto")
    except GhostlayersError:
        return ""
    return f", let held-out tokens choose its damping (--repair {repair}:ridge=auto)"


def show_candidates(scores: ScoreTable) -> None:
    """The shortlist of spans whose loss was measured."""
    listed = set(shortlist(scores))
    show_spans([score for score in scores.spans if score.span in listed], scores, "Shortlist")
    show_score_notes()


def show_spans(spans: Sequence[SpanScore], scores: ScoreTable, title: str) -> None:
    """Scores of spans, the best of each column in bold."""
    best = {
        "cosine": max(score.cosine for score in spans),
        "angular": min(score.angular for score in spans),
        "residual": _least(score.residual for score in spans),
        "loss": _least(score.loss for score in spans),
    }
    rows: list[list[Part]] = []
    for score in spans:
        loss: Part = "" if score.loss is None else _mark(score.loss, best["loss"], 3)
        if score.loss_tokens < scores.num_loss_tokens and score.loss is not None:
            loss = plain("~", loss)
        residual = "" if score.residual is None else _mark(score.residual, best["residual"], 4)
        rows.append(
            [
                format_layers(score.span.layers),
                _mark(score.cosine, best["cosine"], 4),
                _mark(score.angular, best["angular"], 4),
                residual,
                loss,
                "yes" if score.birth else "",
            ]
        )
    apart = scores.scattered
    if apart is not None and scores.spans and len(spans) > 1:
        rows.append([format_layers(apart.layers), "", "", "", f"{apart.loss:.3f}", ""])
    if scores.dense_loss is not None:
        title += f" (dense loss {scores.dense_loss:.3f} nats on the same windows)"
    columns = ("layers", "cosine", "angular", "residual", "repaired loss", "massive birth")
    table(columns, rows, title)


def _least(values: Iterable[float | None]) -> float:
    return min((value for value in values if value is not None), default=0.0)


def show_steps(scores: ScoreTable) -> None:
    """The layers in the order in which a search removed them."""
    rows = [
        [str(number), str(step.layer), "" if step.loss is None else f"{step.loss:.3f}"]
        for number, step in enumerate(scores.steps, start=1)
    ]
    table(("step", "layer removed", "loss after it"), rows, "Layers in the order of their removal")


def _mark(value: float, best: float, digits: int) -> Part:
    text = f"{value:.{digits}f}"
    return good(text) if value == best else text


def show_block_influence(scores: ScoreTable) -> None:
    """Block Influence of every layer, lowest first in bold."""
    lowest = min(scores.block_influence)
    rows = [
        [str(layer), _mark(value, lowest, 4), f"{median:.1f}", f"{largest:.1f}"]
        for layer, (value, median, largest) in enumerate(
            zip(
                scores.block_influence,
                scores.norms.median()[1:],
                scores.norms.largest()[1:],
                strict=True,
            )
        )
    ]
    table(("layer", "Block Influence", "median norm after", "largest norm after"), rows)


def show_contest(contest: Mapping[str, Any]) -> None:
    """Which repair was chosen, why, and what the others lose.

    Args:
        contest: as plain values, of `Contest.to_dict` or a record.
    """
    rows = [
        [
            good(contestant["repair"])
            if contestant["repair"] == contest["winner"]
            else contestant["repair"],
            ("" if contestant["finished"] else "~") + f"{contestant['loss_nats']:.3f}",
            f"{contestant['behind_nats']:.3f} ± {contestant['behind_error']:.3f}",
            str(contestant["windows"]),
            f"{contestant['overhead']:.2%}",
        ]
        for contestant in contest["contestants"]
    ]
    most = max(contestant["windows"] for contestant in contest["contestants"])
    title = f"Repairs on {most} held-out windows (dense {contest['dense_loss_nats']:.3f} there)"
    table(("repair", "loss", "behind the lowest", "windows", "overhead"), rows, title)
    if not all(contestant["finished"] for contestant in contest["contestants"]):
        say(dim("~ on fewer windows, given up because others lose clearly less."))
    say("Repair: ", bold(contest["winner"]), f", because {contest['reason']}.")
    for name, reason in contest["refused"].items():
        say(dim(f"Left out: {name}: {reason.partition('. ')[0]}"))


SCORE_NOTES = (
    "cosine: mean over tokens, before against after the span; high is similar.",
    "angular: angle over pi, at the last token of each window only; low is similar.",
    "residual: what a linear map across the span leaves of each token, on held-out tokens; low is "
    "replaceable.",
    "repaired loss: nats a token after a quick repair (from a sample of tokens; Ghost's where the "
    "one asked for reads more than the stream), on held-out windows, for the best spans by either; "
    "~ on fewer tokens, given up because others lose clearly less.",
    f"massive birth: a token's norm rises above {MASSIVE:g} times the median norm inside the span, "
    f"by a factor of {GROWTH:g} or more relative to it.",
)


def show_score_notes() -> None:
    """What the columns of `show_spans` mean."""
    for note in SCORE_NOTES:
        say(dim(note))


def show_pruned(pruned: PrunedModel) -> None:
    """How the layers were chosen, which they are, and what the cut and its repair cost."""
    table = pruned.table
    if table is not None and table.dense_loss is not None:
        show_candidates(table)
    if table is not None and table.steps:
        show_steps(table)
    show_cut(pruned)
    if pruned.contest is not None:
        show_contest(pruned.contest.to_dict())
    show_losses(pruned)
    if pruned.decision is not None:
        show_decision(pruned.decision)

"""How much each rule for choosing a span loses against the best span, on text nobody chose by.

    python benchmarks/regret.py measure MODEL -o FILE.json --data CALIBRATION --eval A,B,C
    python benchmarks/regret.py table FILE.json ...

`measure` fits Ghost across the spans that any score ranks among its first few, at 10, 20 and 30 %
of the layers, with few and with many calibration windows, and keeps the loss of every held-out
window and of every text. `table` plays every rule on what was kept; a rule sees held-out windows
only, and is judged by the mean loss over the texts of the span that it takes.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from ghostlayers.calibration import cuts, scoring
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.fitting import fit_gaps
from ghostlayers.calibration.passes import Runner
from ghostlayers.model.stream import micro_batches
from ghostlayers.preparation import open_model, read_evaluation
from ghostlayers.recipe import RunOptions
from ghostlayers.repairs import find_method
from ghostlayers.selection.choices import candidate_spans, shortlist
from ghostlayers.statistics.race import run_race
from ghostlayers.text.corpora import load_corpus
from ghostlayers.text.tokens import make_windows

SHARES = (0.1, 0.2, 0.3)
RANKED = 4
"""Spans that each score puts among the candidates."""


def measure(arguments: argparse.Namespace) -> None:
    """Losses of all candidates, window by window."""
    dense = open_model(arguments.model, None, RunOptions())
    model = dense
    few, many = arguments.windows
    corpus = load_corpus(arguments.data, use="calibration")
    windows = make_windows(
        corpus, dense.tokenizer, sequence_length=arguments.length,
        count=many + arguments.held_out, seed=arguments.seed,
    )  # fmt: skip
    calibration, held_out = windows.split_at(many)
    texts = {}
    for name in arguments.eval.split(","):
        separator = " " if "ptb" in name else "\n\n"
        _, texts[Path(name).stem] = read_evaluation(
            name, dense.tokenizer, separator=separator, text_column=None,
            sequence_length=arguments.length, max_windows=arguments.max_windows, bos="auto",
        )  # fmt: skip
    found = {"model": Path(arguments.model).name, "layers": model.num_layers, "cases": []}
    for count in sorted({max(1, round(share * model.num_layers)) for share in arguments.shares}):
        for used in (few, many):
            print(found["model"], count, "layers,", used, "windows", flush=True)
            case = one_case(model, calibration.first(used), held_out, texts, count)
            found["cases"].append({"removed": count, "windows": used, **case})
            Path(arguments.output).write_text(json.dumps(found))


def one_case(model, calibration, held_out, texts, count):
    """Candidates of one length with their scores and losses."""
    spans = candidate_spans(model.num_layers, count)
    table, _ = scoring.measure_scores(Runner(model), calibration, spans)
    ranked = shortlist(table)
    ranked = {*ranked, *(s.span for s in sorted(table.spans, key=lambda s: -s.cosine)[:RANKED])}
    ranked |= {s.span for s in sorted(table.spans, key=lambda s: s.angular)[:RANKED]}
    ranked |= {s.span for s in sorted(table.spans, key=lambda s: s.residual)[:RANKED]}
    influence = table.block_influence
    low = sorted(range(model.num_layers), key=lambda layer: influence[layer])[:count]
    spans = sorted(ranked)
    fitting = Fitting(find_method("ghost"), repaired_inputs=False)
    repairs = fit_gaps(Runner(model), calibration, spans, fitting)
    named = {str(span): {span: repairs[span]} for span in spans}
    # What ShortGPT would take, with Ghost in its gaps.
    from ghostlayers.spans import merge_layers

    gaps = merge_layers(low)
    named["shortgpt"] = fit_gaps(Runner(model), calibration, gaps, Fitting(find_method("ghost")))
    scores = {str(s.span): s for s in table.spans}
    return {
        "scores": {
            str(span): {
                "cosine": scores[str(span)].cosine,
                "angular": scores[str(span)].angular,
                "residual": scores[str(span)].residual,
            }
            for span in spans
        },
        "shortlist": [str(span) for span in shortlist(table)],
        "held_out": losses_by_window(model, held_out, named),
        "texts": {
            name: {n: statistics.mean(v) for n, v in losses_by_window(model, each, named).items()}
            for name, each in texts.items()
        },
    }


def losses_by_window(model, windows, named):
    """Mean loss of each window, by cut."""
    ready = {name: cuts.Cut(model, repairs) for name, repairs in named.items()}
    found = {name: [] for name in named}
    for ids in micro_batches(model, windows):
        batch, streams = cuts._cut_streams(model, ids, ready, cuts.Cut(model, {}))
        for window in range(len(ids)):
            some = {name: streams[name] for name in named}
            each = cuts._window_token_losses(model, batch, some, window)
            for name, losses in each.items():
                found[name].append(float(losses.double().mean()))
    return found


def mean_of(losses):
    return statistics.mean(losses)


def lowest(case, windows):
    """The shortlisted span of lowest loss on so many held-out windows."""
    return min(case["shortlist"], key=lambda name: mean_of(case["held_out"][name][:windows]))


def by_residual_in_a_tie(case, windows, errors=2.0):
    """The least residual of the shortlisted spans within two standard errors of the lowest loss."""
    best = case["held_out"][lowest(case, windows)][:windows]

    def tied(name):
        behind = [a - b for a, b in zip(case["held_out"][name], best, strict=False)]
        error = statistics.stdev(behind) / len(behind) ** 0.5
        return mean_of(behind) <= errors * error

    return min(filter(tied, case["shortlist"]), key=lambda name: case["scores"][name]["residual"])


def raced(case, windows, more=()):
    """The winner of the race with so many held-out windows."""
    angle = min(case["scores"], key=lambda name: case["scores"][name]["angular"])
    names = list(dict.fromkeys([*case["shortlist"], angle, *more]))
    losses = {name: torch.tensor(case["held_out"][name]) for name in names}

    def some(asked, start, stop):
        return {name: losses[name][start:stop] for name in asked}

    return run_race(names, some, min(windows, len(losses[angle]))).best


RULES = {
    "residual in a tie, 4 windows": lambda case: by_residual_in_a_tie(case, 4),
    "residual in a tie, 8 windows": lambda case: by_residual_in_a_tie(case, 8),
    "residual in a tie, 24 windows": lambda case: by_residual_in_a_tie(case, 24),
    "lowest loss, 4 windows": lambda case: lowest(case, 4),
    "lowest loss, 8 windows": lambda case: lowest(case, 8),
    "race, up to 16 windows": lambda case: raced(case, 16),
    "race, up to 24 windows": lambda case: raced(case, 24),
    "the same, scattered layers too": lambda case: raced(case, 24, ["shortgpt"]),
    "lowest residual": lambda case: min(
        case["scores"], key=lambda name: case["scores"][name]["residual"]
    ),
    "streamline": lambda case: max(case["scores"], key=lambda n: case["scores"][n]["cosine"]),
    "angular": lambda case: min(case["scores"], key=lambda n: case["scores"][n]["angular"]),
    "shortgpt": lambda _: "shortgpt",
}
"""From a case to the cut that a rule takes."""

RIVALS = ("streamline", "angular", "shortgpt")


def table(arguments: argparse.Namespace) -> None:
    """Regret in nats by rule and model, and the worst that a rule lies behind a rival."""
    models = [json.loads(Path(file).read_text()) for file in arguments.files]
    print("| rule |", " | ".join(m["model"] for m in models), "| mean | worst | behind a rival |")
    print("|---|" + "---|" * (len(models) + 3))
    for rule in RULES:
        found = [[regrets(case)[rule] for case in model["cases"]] for model in models]
        every = [each for row in found for each in row]
        behind = max(
            regrets(case)[rule] - regrets(case)[rival]
            for model in models for case in model["cases"] for rival in RIVALS
        )  # fmt: skip
        figures = [*map(mean_of, found), mean_of(every), max(every), max(behind, 0.0)]
        print(f"| {rule} |", " | ".join(f"{figure:.3f}" for figure in figures), "|")


def regrets(case):
    """By rule: the mean loss over the unseen texts, above that of the best measured cut."""
    texts = case["texts"].values()
    losses = {n: mean_of([text[n] for text in texts]) for n in case["held_out"]}
    best = min(losses.values())
    return {rule: losses[take(case)] - best for rule, take in RULES.items()}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("model")
    one.add_argument("-o", "--output", required=True)
    one.add_argument("--data", required=True)
    one.add_argument("--eval", required=True)
    one.add_argument("--windows", type=lambda t: [int(n) for n in t.split(",")], default=[8, 64])
    one.add_argument("--shares", type=lambda t: [float(n) for n in t.split(",")], default=SHARES)
    one.add_argument("--held-out", type=int, default=24)
    one.add_argument("--max-windows", type=int, default=6)
    one.add_argument("--length", type=int, default=512)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(call=measure)
    several = commands.add_parser("table")
    several.add_argument("files", nargs="+")
    several.set_defaults(call=table)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    arguments.call(arguments)


if __name__ == "__main__":
    main()

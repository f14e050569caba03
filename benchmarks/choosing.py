"""What `--repair auto` takes, against every single repair, on texts that it never saw.

    python benchmarks/choosing.py measure MODEL -o FILE.json --remove 12-18,3 --data C4 --eval A,B
    python benchmarks/choosing.py table FILE.json ...

`measure` fits every repair of a cut from one sweep, and keeps the loss of every held-out window
and of every text; a number instead of layers leaves the choice of layers to `recoverable`. `table`
plays the contest on what was kept, by several rules and for what loads the result. A rule sees
held-out windows only, and is judged by the mean loss over the texts of the repair that it takes.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from ghostlayers.calibration.contest import fit_contestants, products_of_layers
from ghostlayers.calibration.cuts import race_cuts
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import find_method
from ghostlayers.repairs.auto import CONTESTANTS, NONE, Cost, decide, tied
from ghostlayers.statistics.race import Race, run_race
from ghostlayers.study import Study
from ghostlayers.surgery.eligible import contestants

OTHERS = ("ghost", "replaceme", "normed:ridge=auto")
"""Repairs that do not compete, to see whether they should."""

OVERHEAD = 0.02


def measure(arguments: argparse.Namespace) -> None:
    """Losses of all repairs of every cut, window by window."""
    found = {"model": Path(arguments.model).name, "cases": []}
    study = Study.open(
        arguments.model, data=arguments.data, windows=arguments.windows, repair="auto",
        sequence_length=arguments.length, race_windows=arguments.held_out, layers=1,
    )  # fmt: skip
    for removed in arguments.remove.split(","):
        which = {"layers": int(removed)} if removed.isdigit() else {"remove": removed}
        print(found["model"], removed, flush=True)
        found["cases"].append(one_case(study.with_choices(**which), removed, arguments))
        Path(arguments.output).write_text(json.dumps(found))


def one_case(study: Study, removed: str, arguments: argparse.Namespace) -> dict:
    """All repairs of one cut, with their costs and losses."""
    cut = study.choose()
    names, refused = contestants(study.dense, study.recipe, cut.spans)
    names += [name for name in OTHERS if can_be(study, cut.spans, name)]
    fits, _ = fit_contestants(study, cut.spans, names)
    whole = products_of_layers(study.dense, cut.spans)
    costs = {name: Cost.of(repairs.values(), whole) for name, repairs in fits.items()}
    texts = {}
    for text in arguments.eval.split(","):
        losses = study.losses(cut, fits, on=text, max_windows=arguments.max_windows)
        texts[Path(text).stem] = {name: sums.loss_nats for name, sums in losses.items()}
    return {
        "removed": removed,
        "spans": [str(span) for span in cut.spans],
        "costs": {name: vars(cost) for name, cost in costs.items()},
        "refused": refused,
        "held_out": held_out_losses(study, fits),
        "texts": texts,
    }


def can_be(study: Study, spans, name: str) -> bool:
    """Whether a repair that does not compete can be fitted here."""
    from ghostlayers.errors import GhostlayersError
    from ghostlayers.surgery.eligible import check_repair

    try:
        check_repair(study.dense, study.recipe.repaired_by(name), spans)
    except GhostlayersError:
        return False
    return True


def held_out_losses(study: Study, fits) -> dict[str, list[float]]:
    """Mean loss of each held-out window, by repair: one window at a time, so that nobody leaves."""
    found = {name: [] for name in fits}
    for index in range(len(study.held_out)):
        one = study.held_out.split_at(index)[1].first(1)
        race, _ = race_cuts(study.runner, one, fits)
        for name, losses in race.losses.items():
            found[name] += losses.tolist()
    return found


def raced(case: dict, windows: int, folds: bool, names=CONTESTANTS) -> tuple[Race, dict]:
    """The race of those that may compete, and what each costs."""
    costs = {
        name: Cost(**cost)
        for name, cost in case["costs"].items()
        if name in names and cost["overhead"] <= OVERHEAD
        if not folds or find_method(name).form == "fold"
    }
    losses = {name: torch.tensor(case["held_out"][name], dtype=torch.float64) for name in costs}

    def some(asked, start, stop):
        return {name: losses[name][start:stop] for name in asked}

    return run_race(list(costs), some, min(windows, len(losses[NONE]))), costs


def lowest(case: dict, windows: int, folds: bool) -> str:
    """The lowest loss, ties or not."""
    return raced(case, windows, folds)[0].best


def cheapest_near(case: dict, windows: int, folds: bool) -> str:
    """As `--repair auto` decides."""
    return decide(*raced(case, windows, folds))


def cheapest_running(case: dict, windows: int, folds: bool) -> str:
    """The cheapest of all that never left the race."""
    race, costs = raced(case, windows, folds)
    return min(race.running, key=lambda name: (costs[name].kind, race.behind(name)[0]))


RULES = {
    "auto": lambda case, folds: cheapest_near(case, 32, folds),
    "auto, 8 windows": lambda case, folds: cheapest_near(case, 8, folds),
    "the lowest loss": lambda case, folds: lowest(case, 32, folds),
    "the cheapest that stays": lambda case, folds: cheapest_running(case, 32, folds),
}


def mean_losses(case: dict) -> dict[str, float]:
    """By repair, the mean over the unseen texts."""
    texts = list(case["texts"].values())
    return {name: statistics.mean(text[name] for text in texts) for name in case["held_out"]}


def table(arguments: argparse.Namespace) -> None:
    """What was taken, what would have been the best, and what lies between."""
    cases = [
        (model["model"], case)
        for model in (json.loads(Path(file).read_text()) for file in arguments.files)
        for case in model["cases"]
    ]
    for folds in (False, True):
        print(f"\n## {'What llama.cpp loads' if folds else 'Anything'}\n")
        print("| model | removed | auto takes | above dense | the best | behind it | tied |")
        print("|---|---|---|--:|---|--:|---|")
        for model, case in cases:
            print(f"| {model} | {case['removed']} |", " | ".join(row(case, folds)), "|")
        print("\n| rule | is the best | mean regret | worst |")
        print("|---|--:|--:|--:|")
        for rule, take in RULES.items():
            found = [regret(case, take(case, folds), folds) for _, case in cases]
            best = f"{sum(each <= 0 for each in found)} of {len(found)}"
            print(f"| {rule} | {best} | {statistics.mean(found):.4f} | {max(found):.4f} |")
        print("\n| always | mean regret | worst |\n|---|--:|--:|")
        for name in (*CONTESTANTS, *OTHERS):
            found = [regret(c, name, folds) for _, c in cases if name in may_be(c, folds)]
            if len(found) == len(cases):
                print(f"| {name} | {statistics.mean(found):.4f} | {max(found):.4f} |")


def may_be(case: dict, folds: bool) -> list[str]:
    """All repairs, competing or not, that the engine loads at that overhead."""
    return list(raced(case, 1, folds, (*CONTESTANTS, *OTHERS))[1])


def regret(case: dict, taken: str, folds: bool) -> float:
    """What a repair loses above the best one on the unseen texts."""
    losses = mean_losses(case)
    return losses[taken] - min(losses[name] for name in may_be(case, folds))


def row(case: dict, folds: bool) -> list[str]:
    """The cells of one cut."""
    losses, names = mean_losses(case), may_be(case, folds)
    taken, best = cheapest_near(case, 32, folds), min(names, key=losses.__getitem__)
    dense = statistics.mean(text["dense"] for text in case["texts"].values())
    close = [name for name in tied(raced(case, 32, folds)[0]) if name != taken]
    return [
        taken, f"{losses[taken] - dense:.3f}", best, f"{losses[taken] - losses[best]:.4f}",
        ", ".join(close),
    ]  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("model")
    one.add_argument("-o", "--output", required=True)
    one.add_argument("--remove", required=True)
    one.add_argument("--data", required=True)
    one.add_argument("--eval", required=True)
    one.add_argument("--windows", type=int, default=Recipe().num_fit_windows)
    one.add_argument("--held-out", type=int, default=32)
    one.add_argument("--max-windows", type=int, default=6)
    one.add_argument("--length", type=int, default=512)
    one.set_defaults(call=measure)
    several = commands.add_parser("table")
    several.add_argument("files", nargs="+")
    several.set_defaults(call=table)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    arguments.call(arguments)


if __name__ == "__main__":
    main()

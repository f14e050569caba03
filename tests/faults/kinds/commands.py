"""Commands that read a model folder, one of which every damaged input meets."""

from faults.materials import QUICK, Place, Plan

TEXT = "in/text.txt"
EVAL = ["-d", TEXT, "--sequence-length", "32", "--max-windows", "4", "--json", "out.json"]
CUT = [2, 3]


def evaluate(model: str) -> Plan:
    """Its perplexity, which the oracle knows too."""
    arguments = ["eval", model, *EVAL, "--device", "cpu"]
    return Plan(arguments, "", truth=model)


def prune(model: str, repair: str = "none") -> Plan:
    """Two layers cut; unrepaired, the oracle knows what the result is worth."""
    arguments = [
        "prune",
        model,
        "--remove",
        "2-3",
        "--repair",
        repair,
        "-d",
        TEXT,
        "-o",
        "out",
        *QUICK,
    ]
    return Plan(arguments, "", truth=model, drop=CUT if repair == "none" else [])


def others(model: str) -> list[Plan]:
    """The rest: accepted only where the oracle can load the model."""
    score = ["score", model, "-n", "1", "-d", TEXT, "--json", "out.json", "--windows", "4"]
    score += ["--held-out-windows", "2", "--sequence-length", "32", "--device", "cpu"]
    kl = ["eval", model, *EVAL, "--against", model, "--device", "cpu"]
    gguf = ["prune", model, "--remove", "2-3", "--repair", "none", "-d", TEXT, "-o", "out", *QUICK]
    disk = ["eval", model, *EVAL, "--device", "cpu", "--offload", "disk"]
    return [
        Plan(score, "", truth=model),
        Plan(kl, "", truth=model),
        Plan([*gguf, "--pre-tokenizer", "gpt-2", "--gguf", "out.gguf"], "", truth=model, drop=CUT),
        Plan(disk, "", truth=model),
        prune(model, "ghost"),
        prune(model, "refit:2"),
    ]


def any_of(place: Place, model: str, label: str) -> Plan:
    """One of them; perplexity, whose number is checked, is the commonest."""
    plans = [evaluate(model)] * 4 + [prune(model)] * 2 + others(model)
    plan = place.rng.choice(plans)
    plan.label = label
    return plan

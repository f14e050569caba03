"""Options with numbers and words that nobody means."""

from faults.kinds.commands import TEXT
from faults.materials import QUICK, Place, Plan

VALUES = ["inf", "-inf", "nan", "-1", "0", "1e400", str(10**30), "1" * 5000, "x", "", "0x10", "1_0"]
REPAIRS = [
    "ghost:ridge=inf", "ghost:ridge=nan", "ghost:ridge=-1", "piecewise:1000000000", "piecewise:0",
    "refit:-1", "refit:99999999999", "piecewise:x", "ghost:", "ghost:x=1", ":", "refit:1e9",
    "refit:" + "9" * 4500, "ghost:ridge=1,ridge=2", "\x1b[31mred", "replaceme:cosine:steps=inf",
    "ghost:ridge=" + "9" * 400, "joint", "hadamard", "magnitude:mean=x", "linearpatch-x",
]  # fmt: skip
SPANS = {
    "0-99": 0, "-1": 0, "4-2": 0, "0-4": 0, "1,1": 0, "x": 0, "": 0, "1-2-3": 0,
    "1-" + "9" * 5000: 0,
    "0-1000000000": 0, "1,2,": 1, "1..2": 0, "\x1b[2J": 0, "³": 0, "1-٣": 1, "5": 0, "1, 2": 1,
    "1.0": 0, "0x1": 0, "-": 0, ",": 0,
}  # fmt: skip
"""Layers to remove; whether that could be meant."""

NUMERIC = [
    "--ridge", "--absolute-ridge", "--windows", "--fit-windows", "--held-out-windows",
    "--search-windows", "--race-windows", "--sequence-length", "--seed", "--batch-size", "-n",
    "--refit", "--max-memory", "--token-weight", "--keep-layers", "--inputs", "--sampling",
    "--dtype", "--device", "--offload", "--select", "--cosine-axis", "--bos", "--separator",
    "--text-column", "--preset", "--revision", "--export", "--save", "--pre-tokenizer",
]  # fmt: skip
HARMLESS = {("--seed", "0"), ("--batch-size", "0"), ("--held-out-windows", "0"), ("--seed", "0x10")}
MUST = {"inf", "-inf", "nan", "1e400", "1" * 5000, "x", ""}


def make(place: Place, index: int) -> Plan:
    """A command with one such value; most of them must be refused."""
    rng = place.rng
    place.take("tied", "text.txt")
    base = ["prune", "in/tied", "-d", TEXT, "-o", "out"]
    kind = index % 4
    if kind == 0:
        repair = REPAIRS[(index // 4) % len(REPAIRS)]
        known = {"joint", "hadamard", "ghost:ridge=inf"}
        must = "either" if repair in known - {"ghost:ridge=inf"} else "refuse"
        arguments = [*base, *QUICK, "--remove", "2-3", "--repair", repair]
        return Plan(arguments, f"--repair {repair[:40]}", must=must)
    if kind == 1:
        span = list(SPANS)[(index // 4) % len(SPANS)]
        arguments = [*base, *QUICK, "--remove", span, "--repair", "none"]
        must = "either" if SPANS[span] else "refuse"
        return Plan(arguments, f"--remove {span[:40]}", must=must)
    option, value = rng.choice(NUMERIC), rng.choice(VALUES)
    cut = [] if option in ("-n", "--select") else ["--remove", "2-3"]
    arguments = [*base, *QUICK, *cut, "--repair", "ghost", option, value]
    refuse = (option.endswith("ridge") and value in MUST | {"-1"}) or (
        value in ("nan", "x", "1" * 5000) and option.startswith("--") and "separ" not in option
    )  # fmt: skip
    must = "refuse" if refuse and (option, value) not in HARMLESS else "either"
    must = "either" if option in ("--revision", "--text-column") else must
    return Plan(arguments, f"{option} {value[:40]}", must=must)

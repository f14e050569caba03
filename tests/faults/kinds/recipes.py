"""Recipes: YAML of every shape, with keys and values that mean nothing."""

import json
from random import Random

from faults.materials import Place, Plan

WHOLE = [
    "", "null", "[]", "3", "command: prune", "command: x", "command: [prune]", "- a\n- b",
    "command: prune\ncommand: eval\nmodel: x", "a: &a [*a]", "!!python/object/apply:os.getcwd []",
    "command: !!python/name:os.system ''", "{" * 3000, "[" * 30_000, "\0", "command: prune\n\tx: 1",
    "command: prune\nmodel: &m in/tied\nlayers: *x", "a: 1\n--- \nb: 2", "\ufeffcommand: prune",
    "command: prune\nlayers: " + "9" * 5000, "command: prune\nvary: {layers: 3}",
    "command: eval\nvary: {seed: [" + "1," * 3000 + "1]}\nmodel: in/tied\noutput: out",
    "x: &x [1,1,1,1,1,1,1,1]\ny: &y [*x,*x,*x,*x,*x,*x,*x,*x]\nz: [*y,*y,*y,*y,*y,*y,*y,*y]",
    "command: prune\nmodel: in/tied\ndata: in/text.txt\noutput: out\nlayers: 1\nlayers: 2",
]  # fmt: skip
KEYS = [
    "model", "output", "layers", "remove", "repair", "select", "data", "windows", "seed", "ridge",
    "sequence_length", "dtype", "device", "vary", "overwrite", "json", "tasks", "limit", "x",
    "sequence-length", "batch_size", "refit", "preset", "trust_remote_code", "debug",
]  # fmt: skip
VALUES: list[object] = [
    None, True, -1, 0, 3, 10**30, 0.5, float("inf"), float("nan"), "", "x", "in/tied", [], [1, 2],
    ["a"], {}, {"a": 1}, "\x1b[31m[/x]", [[1]], "a" * 5000, "1e-6", ".inf",
]  # fmt: skip


def make(place: Place, index: int) -> Plan:
    """A recipe."""
    place.take("tied", "text.txt")
    path = place.inputs / "recipe.yaml"
    if index < len(WHOLE):
        path.write_text(WHOLE[index], encoding="utf-8")
        return Plan(["run", "in/recipe.yaml"], f"recipe {WHOLE[index][:40]!r}", must="refuse")
    path.write_text(_generated(place.rng), encoding="utf-8")
    more = ["--set", f"{place.rng.choice(KEYS)}={place.rng.choice(['', 'x', '[', '3', '!!x y'])}"]
    arguments = ["run", "in/recipe.yaml", *(more if place.rng.random() < 0.2 else [])]
    return Plan(arguments, f"recipe {path.read_text()[-80:]!r}")


def _generated(rng: Random) -> str:
    """A recipe that works, with a few entries exchanged."""
    command = rng.choice(["prune", "eval", "score", "compare", "bench"])
    content: dict[str, object] = {
        "command": command,
        "model": "in/tied",
        "data": "in/text.txt",
        "device": "cpu",
        "sequence_length": 32,
    }
    if command in ("prune", "score"):
        content |= {"layers": 1, "windows": 8, "held_out_windows": 2}
    if command in ("prune", "compare"):
        content |= {"output": "out"}
    if command == "eval":
        content |= {"max_windows": 2}
    for _ in range(rng.randrange(1, 3)):
        content[rng.choice(KEYS)] = rng.choice(VALUES)
    return json.dumps(content).replace("Infinity", ".inf").replace("NaN", ".nan")

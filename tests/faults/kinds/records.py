"""What others have written: records, adapters, requests, parts, code of results, GGUF files."""

import json
from pathlib import Path
from random import Random
from typing import Any

from faults.kinds.commands import evaluate
from faults.materials import QUICK, Place, Plan

ODD = [
    None,
    True,
    -1,
    10**30,
    1e308,
    "",
    "x",
    "\x1b[31m[/x]\x07",
    "../../x",
    [],
    {},
    [[]],
    "a" * 300,
]


def make(place: Place, index: int) -> Plan:
    """One of them, damaged, under a command that reads it."""
    return KINDS[index % len(KINDS)](place)


def _other_type(value: Any, rng: Random) -> Any:
    """One value somewhere within, replaced or removed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _other_type(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _other_type(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def _damage(path: Path, rng: Random) -> str:
    """Cut it short, or change a value in it."""
    text = path.read_text()
    how = rng.choice(["short", "value", "value", "value", "whole", "nan", "deep"])
    if how == "short":
        path.write_text(text[: rng.randrange(len(text))])
    elif how == "whole":
        path.write_text(rng.choice(["null", "[]", "3", '"x"', "{}", "\0", "\ufeff{}"]))
    elif how == "nan":
        path.write_text(text.replace("0.", "NaN, 0.", 1) if rng.random() < 0.3 else "NaN")
    elif how == "deep":
        path.write_text('{"a":' * 50_000)
    else:
        path.write_text(json.dumps(_other_type(json.loads(text), rng)))
    return f"{path.name}, {how}"


def _inspect(place: Place) -> Plan:
    name = place.rng.choice(["custom", "stock", "adapter"])
    folder = place.take(name)
    file = place.rng.choice(["ghostlayers.json", "ghostlayers.json", "config.json"])
    path = folder / file if (folder / file).exists() else folder / "ghostlayers.json"
    label = _damage(path, place.rng)
    more = place.rng.choice([[], ["--json"]])
    return Plan(["inspect", f"in/{name}", *more], f"inspect, {label}")


def _push(place: Place) -> Plan:
    folder = place.take("custom")
    label = _damage(folder / "ghostlayers.json", place.rng)
    return Plan(["push", "in/custom", "a/b", "--dry-run"], f"push, {label}")


def _changed_and_pushed(place: Place) -> Plan:
    """A file that is no longer as the record says must not go out."""
    name = place.rng.choice(["custom", "stock"])
    folder = place.take(name)
    path = place.rng.choice([p for p in sorted(folder.iterdir()) if p.name != "ghostlayers.json"])
    content = path.read_bytes()
    path.write_bytes(content + b"\n" if content else b"x")
    return Plan(
        ["push", f"in/{name}", "a/b", "--dry-run"], f"push of a changed {path.name}", must="refuse"
    )


def _materialize(place: Place) -> Plan:
    place.take("adapter", "tied")
    files = ["ghostlayers.json", "adapter_config.json"]
    found = [p for f in files if (p := place.inputs / "adapter" / f).exists()]
    label = _damage(place.rng.choice(found), place.rng)
    arguments = ["materialize", "in/adapter", "-o", "out", "--base", "in/tied"]
    return Plan([*arguments, "--device", "cpu"], f"materialize, {label}")


def _custom(place: Place) -> Plan:
    """A repaired checkpoint whose config says something else about its repairs."""
    folder = place.take("custom", "text.txt")
    path = folder / "config.json"
    content = json.loads(path.read_text())
    own = sorted(set(content) - set(json.loads((place.templates / "tied/config.json").read_text())))
    key = place.rng.choice(own or sorted(content))
    place.edit_json(path, **{key: place.rng.choice([..., *ODD])})
    plan = evaluate("in/custom")
    plan.truth, plan.label = None, f"config of a repaired checkpoint: {key}"
    plan.must = "refuse" if key.startswith("ghostlayers") else "either"
    return plan


def _comparison(place: Place) -> Plan:
    """A comparison that is gone on with, or begun over one that is damaged."""
    folder = place.take("compared", "tied", "text.txt")
    target = place.root / "out"
    folder.rename(target)
    files = [p for p in sorted(target.rglob("*.json")) if p.is_file()]
    label = _damage(place.rng.choice(files), place.rng)
    more = place.rng.choice([[], ["--overwrite"]])
    arguments = ["compare", "in/tied", "-n", "1", "--select", "angular", "--repair", "none,ghost"]
    arguments += ["-d", "in/text.txt", "--eval-data", "in/text.txt", "--max-windows", "2"]
    plan = Plan([*arguments, "--no-speed", *QUICK, "-o", "out", *more], f"compare over {label}")
    plan.interrupted = True  # what lies there stays
    return plan


def _gguf(place: Place) -> Plan:
    """Bits of a GGUF's header; what it then says cannot be known, so nothing must break."""
    path = place.take("model.gguf", "text.txt")
    content = bytearray(path.read_bytes())
    how = place.rng.choice(["flip", "flip", "flip", "short", "count"])
    if how == "short":
        content = content[: place.rng.randrange(len(content))]
    elif how == "count":
        at = place.rng.choice([4, 8, 16])
        content[at : at + 8] = place.rng.choice([2**63, 10**6, 10**12]).to_bytes(8, "little")
    else:
        at = place.rng.randrange(min(len(content), 4000))
        content[at] ^= 1 << place.rng.randrange(8)
    path.write_bytes(content)
    plan = evaluate("in/model.gguf")
    plan.truth, plan.label = None, f"GGUF, {how}"
    return plan


KINDS = [
    _inspect, _push, _changed_and_pushed, _materialize, _custom, _comparison, _gguf, _inspect,
]  # fmt: skip

"""Tokenizers that do not fit, or are cut short."""

import json
from random import Random

from faults.kinds.commands import any_of
from faults.materials import Place, Plan


def make(place: Place, index: int) -> Plan:
    """A model with something wrong in its tokenizer's files."""
    rng = place.rng
    model = place.take("tied", "text.txt")
    file, config = model / "tokenizer.json", model / "tokenizer_config.json"
    what = ["more tokens", "short", "gone", "other type", "config short", "config value", "both"]
    kind = what[index % len(what)]
    if kind == "more tokens":
        content = json.loads(file.read_text())
        tokens = [chr(0x4E00 + n) for n in range(rng.randrange(1, 60))]
        vocab = content["model"]["vocab"]
        vocab.update({t: 256 + n for n, t in enumerate(tokens)})
        content["added_tokens"] += [_added(256 + len(tokens), " the")]
        file.write_text(json.dumps(content))
    elif kind in ("short", "config short"):
        path = file if kind == "short" else config
        text = path.read_text()
        path.write_text(text[: rng.randrange(len(text))])
    elif kind == "gone":
        rng.choice([file, config]).unlink()
    elif kind == "both":
        file.unlink()
        config.unlink()
    elif kind == "other type":
        content = json.loads(file.read_text())
        key = rng.choice(sorted(content))
        content[key] = rng.choice([None, 1, "x", [], {}])
        file.write_text(json.dumps(content))
    else:
        content = json.loads(config.read_text())
        key = rng.choice([*content, "tokenizer_class", "chat_template", "model_max_length"])
        content[key] = _value(rng)
        config.write_text(json.dumps(content))
    plan = any_of(place, "in/tied", f"tokenizer: {kind}")
    plan.truth = None if kind in ("config value", "other type") else plan.truth
    plan.must = "refuse" if kind in ("both", "more tokens") else "either"
    return plan


def _added(number: int, text: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": text, **flags}


def _value(rng: Random) -> object:
    return rng.choice([None, 3, -1, "x", "LlamaTokenizer", [], {}, "\x1b[2J", 10**30, {"a": "b"}])

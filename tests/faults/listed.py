"""Every input that was ever found to go wrong, run again: ``python -m faults.listed``."""

import argparse
import contextlib
import functools
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import materials
from faults.campaign import Lane, make_templates
from faults.judge import Verdict
from faults.kinds import canaries, commands, configs, gguf_files, paths, weights
from faults.kinds.commands import TEXT
from faults.kinds.interruptions import COMMANDS, _fresh, _polite
from faults.kinds.machines import ODD
from faults.materials import QUICK, Place, Plan

Try = Callable[[Lane, Place], Verdict]


@dataclass(frozen=True)
class Listed:
    """One input.

    Attributes:
        promise: that it broke.
        input: in words.
        wanted: what is right.
        attempt: carries it out.
    """

    promise: str
    input: str
    wanted: str
    attempt: Try


def one(make: Callable[[Place], Plan], *, must: str = "either", **changes: Any) -> Try:
    """A single command."""

    def attempt(lane: Lane, place: Place) -> Verdict:
        plan = make(place)
        plan.must = must
        for key, value in changes.items():
            setattr(plan, key, value)
        return lane.attempt(place, plan)

    return attempt


def damaged(name: str, model: str = "tied", **kinds: Any) -> Callable[[str], Try]:
    """A way to damage weights, under a command by name."""

    def under(command: str) -> Try:
        def make(place: Place) -> Plan:
            folder = place.take(model, "text.txt")
            weights.DAMAGES[name](folder / "model.safetensors", place.rng)
            return by_name(command, f"in/{model}")

        return one(make, must="refuse")

    return under


def by_name(command: str, model: str) -> Plan:
    """A command on a model."""
    arguments = [each.replace("MODEL", model) for each in canaries.ON_MODELS[command]]
    return Plan(arguments, command, truth=model)


def config(must: str = "either", command: str = "eval", **changes: Any) -> Try:
    """Entries of a config under a command."""

    def make(place: Place) -> Plan:
        place.edit_json(place.take("tied", "text.txt") / "config.json", **changes)
        return by_name(command, "in/tied")

    return one(make, must=must)


def odd(kind: str, command: str = "eval", must: str = "refuse") -> Try:
    """A model of another kind."""

    def attempt(lane: Lane, place: Place) -> Verdict:
        place.take("text.txt")
        if failed := lane.call(place, "faults.odd_models:make", kind=kind, folder="in/odd"):
            return Verdict("campaign", str(failed))
        plan = by_name(command, "in/odd")
        plan.truth, plan.must = None, must
        return lane.attempt(place, plan)

    return attempt


def then(first: Try, more: Callable[[Lane, Place], str | None]) -> Try:
    """Look at what a command made."""

    def attempt(lane: Lane, place: Place) -> Verdict:
        verdict = first(lane, place)
        if verdict.kind != "ok":
            return verdict
        wrong = more(lane, place)
        return Verdict("silent", str(wrong)) if wrong else verdict

    return attempt


def _call(function: str, **arguments: Any) -> Callable[[Lane, Place], str | None]:
    def look(lane: Lane, place: Place) -> str | None:
        return lane.call(place, f"faults.odd_models:{function}", folder="out", **arguments)

    return look


def _gguf_agrees(lane: Lane, place: Place) -> str | None:
    found = []
    for name in ("out", "out.gguf"):
        plan = commands.evaluate(name)
        lane.run(place, plan, "said/again")
        found.append(json.loads((place.root / "out.json").read_text())["results"][0]["loss_nats"])
    return None if abs(found[0] - found[1]) < 1e-3 else f"folder {found[0]}, its GGUF {found[1]}"


def _half_as_large(lane: Lane, place: Place) -> str | None:
    kinds = {each[0] for each in weights.read(place.root / "out" / "model.safetensors").values()}
    return None if kinds == {"BF16"} else f"stored as {kinds}"


def _materializes(lane: Lane, place: Place) -> str | None:
    arguments = ["materialize", "out", "-o", "whole", "--base", "in/tied"]
    said = lane.run(place, Plan(arguments, ""), "said/again")
    return None if said.code == 0 else f"cannot be materialised: {said.err.strip()[-200:]}"


def _both_ropes(lane: Lane, place: Place) -> str | None:
    content = json.loads((place.root / "out" / "config.json").read_text())
    return None if "rope_theta" in content else "config.json carries only rope_parameters"


def _no_paths(lane: Lane, place: Place) -> str | None:
    for path in (place.root / "out").rglob("*"):
        if path.suffix in (".html", ".json", ".md") and str(place.root) in path.read_text():
            return f"{path.name} holds the absolute path of the text"
    return None


def _plain_card(lane: Lane, place: Place) -> str | None:
    text = (place.root / "out" / "README.md").read_text()
    return "raw HTML in README.md" if "<script>" in text else None


def text(ending: str, content: bytes, must: str = "succeed", **changes: Any) -> Try:
    """Calibration on a file."""

    def make(place: Place) -> Plan:
        place.take("tied", "text.txt")
        (place.inputs / f"data{ending}").write_bytes(content)
        plan = commands.prune("in/tied")
        plan.arguments = [f"in/data{ending}" if each == TEXT else each for each in plan.arguments]
        plan.truth, plan.drop = None, []
        return plan

    return one(make, must=must, **changes)


def dataset(kind: str, ending: str = "", must: str = "succeed") -> Try:
    """Calibration on what the datasets library writes."""

    def attempt(lane: Lane, place: Place) -> Verdict:
        place.take("tied", "text.txt")
        path = f"in/data{ending}"
        if failed := lane.call(place, "faults.listed:write_data", kind=kind, path=path):
            return Verdict("campaign", str(failed))
        plan = commands.prune("in/tied")
        plan.arguments = [path if each == TEXT else each for each in plan.arguments]
        plan.truth, plan.drop, plan.must = None, [], must
        return lane.attempt(place, plan)

    return attempt


def write_data(kind: str, path: str) -> None:
    """In a fork."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": [SENTENCE * 3] * 90})
    if kind == "saved":
        rows.save_to_disk(path)
    elif kind == "arrow":
        rows.save_to_disk("tmp/rows")
        next(Path("tmp/rows").glob("*.arrow")).rename(path)
        for left in Path("tmp/rows").iterdir():
            left.unlink()
        Path("tmp/rows").rmdir()
    elif kind == "large parquet":
        datasets.Dataset.from_dict({"text": [SENTENCE * 600] * 2000}).to_parquet(path)
    elif kind == "folder":
        Path(path, "deeper").mkdir(parents=True)
        rows.to_parquet(f"{path}/deeper/a.parquet")
    else:
        Path(path).mkdir()
        rows.select([]).to_parquet(f"{path}/a.parquet")
        rows.to_parquet(f"{path}/b.parquet")


SENTENCE = "The river carries the letter near the old bridge. "
LINES = b"".join(json.dumps({"text": SENTENCE * 3}).encode() + b"\n" for _ in range(90))
CHAT = [{"from": "human", "value": SENTENCE}, {"from": "gpt", "value": "Yes, it does."}]


def canary(label: str) -> Try:
    """One of the canaries, by its label."""
    found = next(each for each in canaries.CANARIES if each.label == label)
    return one(found.plan)


def relation(label: str) -> Try:
    """A relation of paths, by its label."""
    index, (_, _, must) = next(
        (i, each) for i, each in enumerate(paths.RELATIONS) if each[0] == label
    )
    return one(lambda place: paths.make(place, index), must=must)


def environment(label: str) -> Try:
    """An odd environment."""
    found = next(each for each in ODD if each.label == label)
    return lambda lane, place: found.carry_out(lane, place)[1]


def killed_after(name: str, arguments: list[str], ready: Callable[[Place], bool], sent: str) -> Try:
    """Interrupted as soon as something is seen; then the same command must end well."""

    def attempt(lane: Lane, place: Place) -> Verdict:
        _fresh(place, name)
        started = lane.start(place, Plan(arguments, name), "said/first")
        until = time.monotonic() + 60
        while not ready(place) and time.monotonic() < until:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(started.pid, getattr(signal, sent))
        code = started.wait(60)
        if code == 0:
            return Verdict("ok", "it had ended before")
        errors = (place.root / "said/first/stderr").read_text(errors="replace")
        if found := _polite(sent, code, errors):
            return found
        return lane.attempt(place, Plan(arguments, name, must="succeed"))

    return attempt


def early(arguments: list[str], sent: str, seconds: float) -> Try:
    """A process of its own, interrupted in its first seconds."""

    def attempt(lane: Lane, place: Place) -> Verdict:
        place.take("tied", "text.txt", "stock")
        command = [sys.executable, "-m", "ghostlayers", *arguments]
        process = subprocess.Popen(
            command, cwd=place.root, env=place.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        time.sleep(seconds)
        process.send_signal(getattr(signal, sent))
        try:
            _, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            return Verdict("hang", f"does not end at {sent}")
        if found := _polite(sent, process.returncode, errors):
            return found
        left = materials.left_behind(place.root, ("out", "out.json", "out.gguf"))
        return Verdict("left", ", ".join(left)) if left else Verdict("ok")

    return attempt


def together(lane: Lane, place: Place) -> Verdict:
    """Two runs with one output."""
    from faults.kinds.interruptions import Together

    return Together().carry_out(lane, place)[1]


def record(
    change: Callable[[dict[str, Any]], object], command: str = "inspect", **more: Any
) -> Try:
    """A record of a downloaded folder."""

    def make(place: Place) -> Plan:
        path = place.take("custom", "text.txt", "tied") / "ghostlayers.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        plan = by_name(command, "in/custom")
        plan.truth = None
        return plan

    return one(make, **more)


def file_of(name: str, content: str | bytes, arguments: list[str], **more: Any) -> Try:
    """A file beside the model, and a command that reads it."""

    def make(place: Place) -> Plan:
        place.take("tied", "text.txt", "custom", "stock", "compared")
        path = place.inputs / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Plan(arguments, name)

    return one(make, **more)


def pushed(name: str) -> Try:
    """A changed file in a folder that is sent."""

    def make(place: Place) -> Plan:
        path = place.take("custom") / name
        path.write_bytes(path.read_bytes() + b"\n")
        return Plan(["push", "in/custom", "a/b", "--dry-run"], name)

    return one(make, must="refuse")


def _guard(place: Place) -> Plan:
    path = place.take("custom", "text.txt") / "config.json"
    content = json.loads(path.read_text())
    own = [key for key in content if "ghost" in key or key == "auto_map"]
    changes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    place.edit_json(path, **dict.fromkeys(own, ...), **changes)
    return by_name("eval", "in/custom")


def _nan_norm(place: Place, *command: str) -> Plan:
    path = place.take("tied", "text.txt") / "model.safetensors"
    tensors = weights.read(path)
    kind, shape, content = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = (kind, shape, b"\0\0\xc0\x7f" + content[4:])
    weights.write(path, tensors)
    return Plan(list(command), "NaN") if command else by_name("eval, against itself", "in/tied")


def _nan_token(place: Place) -> Plan:
    path = place.take("tied", "text.txt") / "model.safetensors"
    tensors = weights.read(path)
    kind, shape, content = tensors["model.embed_tokens.weight"]
    row = len(content) // shape[0] * 72
    changed = content[:row] + b"\0\0\xc0\x7f" + content[row + 4 :]
    tensors["model.embed_tokens.weight"] = (kind, shape, changed)
    weights.write(path, tensors)
    return by_name("eval, against itself", "in/tied")


def _zeros(place: Place) -> Plan:
    path = place.take("tied", "text.txt") / "model.safetensors"
    tensors = weights.read(path)
    write = {n: (k, s, b"\0" * len(c)) for n, (k, s, c) in tensors.items()}
    weights.write(path, write)
    return commands.prune("in/tied", "piecewise:2")


def _gguf_blocks(place: Place) -> Plan:
    path = place.take("model.gguf", "text.txt")
    content = path.read_bytes()
    at = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    path.write_bytes(content[:at] + (10**6).to_bytes(4, "little") + content[at + 4 :])
    return by_name("eval", "in/model.gguf")


def gguf(name: str) -> Try:
    """A GGUF file that is not what it says."""

    def make(place: Place) -> Plan:
        path = place.take("whole.gguf", "text.txt", "tied").with_name("whole.gguf")
        gguf_files.WRONG[name](path, place.rng)
        return by_name("eval", "in/whole.gguf")

    return one(make, must="refuse")


def _comparison(name: str) -> Try:
    def make(place: Place) -> Plan:
        place.take("compared", "tied", "text.txt").rename(place.root / "out")
        found = sorted((place.root / "out").rglob(name))[0]
        found.write_text(found.read_text()[:40])
        return Plan([*materials.RESULTS["compared"], "-o", "out"], name, interrupted=True)

    return one(make)


def _prune(*more: str, repair: str = "ghost") -> list[str]:
    return ["prune", "in/tied", "--remove", "2-3", "--repair", repair, "-d", TEXT, *QUICK, *more]


def option(*more: str, must: str = "refuse", repair: str = "ghost") -> Try:
    """Options of prune."""

    def make(place: Place) -> Plan:
        place.take("tied", "text.txt")
        return Plan(_prune("-o", "out", *more, repair=repair), " ".join(more) or repair)

    return one(make, must=must)


REFUSED = "refused by name before anything is computed"
MODULE = damaged("module. before every name")
NEEDLESS = {"auto_map": {"AutoModelForCausalLM": "modeling_my.My", "AutoConfig": "my.C"}}


def rows() -> list[Listed]:
    """All of them."""
    found: list[Listed] = []

    def add(promise: str, text: str, wanted: str, attempt: Try) -> None:
        found.append(Listed(promise, text, wanted, attempt))

    _weights(add)
    _results(add)
    _code(add)
    _lost(add)
    _going_on(add)
    _numbers(add)
    _texts(add)
    _messages(add)
    _shown(add)
    return found


def _weights(add: Callable[..., None]) -> None:
    for name in ("2^60 entries of an array", "no epsilon", "another type", "a token less"):
        add("P1", f"a GGUF file: {name}", REFUSED, gguf(name))
    add("P1", "untied config, no head", REFUSED, config("refuse", tie_word_embeddings=False))
    add(
        "P1",
        "the same, eval --against itself",
        REFUSED,
        config("refuse", "eval, against itself", tie_word_embeddings=False),
    )
    for kind, name in (
        ("classifier", "a classifier's folder"),
        ("bare", "a LlamaModel, no head"),
        ("bert", "a BertModel"),
        ("masked", "an encoder that sees ahead"),
        ("mixtral", "a Mixtral without experts"),
    ):
        add("P1", f"{name}: eval", REFUSED, odd(kind))
        add("P1", f"{name}: prune", REFUSED, odd(kind, "prune, none"))
    for command in (
        "eval",
        "prune, none",
        "score",
        "compare",
        "bench",
        "prune, GGUF",
        "prune, offload",
    ):
        add("P1", f"module. before every name: {command}", REFUSED, MODULE(command))
    for name in (
        "base_model.model. before every name",
        "names of another family",
        "a bit of a name flipped",
        "a name is missing",
        "a tensor too many",
    ):
        add("P1", name, REFUSED, damaged(name)("eval"))
    add(
        "P1",
        "fewer layers in the config than in the file",
        REFUSED,
        config("refuse", num_hidden_layers=4),
    )
    add("P1", "a repaired checkpoint whose guard was edited", REFUSED, one(_guard, must="refuse"))
    head = one(lambda place: _own_head(place))
    add(
        "P1",
        "a head of its own under a tied config",
        "folder and GGUF agree",
        then(head, _gguf_agrees),
    )
    add(
        "P1",
        "weights wider than the config's type: prune",
        "stored as the file has them",
        config("succeed", "prune, none", dtype="bfloat16"),
    )
    add(
        "P1",
        "the same, --save adapter",
        "materialises",
        then(config("succeed", "prune, adapter", dtype="bfloat16"), _materializes),
    )
    add(
        "P1",
        "bfloat16 under a float32 config",
        "not twice as large",
        then(one(_half, must="succeed"), _half_as_large),
    )
    for value in ("torch.bfloat16", "auto"):
        add(
            "P1",
            f"torch_dtype={value}",
            "understood, or refused by name",
            config("either", "prune, none", dtype=..., torch_dtype=value),
        )
    add(
        "P1",
        "a Mamba in bfloat16, wider parts",
        "pruned, and reads as the README says",
        then(odd("mamba", "prune, none", "succeed"), _call("read_as_told")),
    )
    add(
        "P1",
        "piecewise under autocast",
        "trains",
        then(option("-o", "out", must="succeed", repair="piecewise:2"), _call("under_autocast")),
    )


def _own_head(place: Place) -> Plan:
    folder = place.take("tied", "text.txt")
    weights.DAMAGES["a head of its own under a config that says tied"](
        folder / "model.safetensors", place.rng
    )
    plan = by_name("prune, GGUF", "in/tied")
    plan.drop = commands.CUT
    return plan


def _half(place: Place) -> Plan:
    place.edit_json(place.take("bfloat16", "text.txt") / "config.json", dtype="float32")
    plan = commands.prune("in/bfloat16")
    plan.truth, plan.drop = None, []
    return plan


def _results(add: Callable[..., None]) -> None:
    add(
        "P2",
        "a base with a needless auto_map: prune",
        "succeeds; the entry does not travel",
        config("succeed", "prune, none", **NEEDLESS),
    )
    for name, how in (("prune, ghost", "saved again where ghostlayers is imported"),):
        add(
            "P2",
            how,
            "the code travels",
            then(config("succeed", name), _call("saved_again", out="again")),
        )
    add(
        "P2",
        "config for old readers",
        "both spellings of rope",
        then(config("succeed", "prune, none"), _both_ropes),
    )
    add(
        "P2",
        "Gemma 3 with its tower",
        "cut, or refused in one sentence",
        odd("gemma3", "prune, none", "either"),
    )
    add("P2", "return_dict=false", "no bug", config("either", "prune, none", return_dict=False))
    add("P2", "RWKV", "refused in one sentence", odd("rwkv", "prune, none", "either"))

    def more_tokens(place: Place) -> Plan:
        from faults.kinds import tokenizer_files

        return tokenizer_files.make(place, 0)

    add(
        "P2", "more tokens than rows", "refused, naming both sizes", one(more_tokens, must="refuse")
    )


def _code(add: Callable[..., None]) -> None:
    for command in (
        "prune, none",
        "prune, refit",
        "prune, stock layer",
        "prune, GGUF",
        "materialize",
    ):
        for place in ("config, code of another folder", "config, code of a hub's repository"):
            add("P3", f"{place}: {command}", "no code runs", canary(f"{place}; {command}"))
    for name in canaries.TASK_FILES:
        add("P3", f"task file, {name}", "no code runs", canary(f"task, {name}"))
    add("P3", "a recipe that trusts", "no code runs", canary("recipe, trust"))


def _lost(add: Callable[..., None]) -> None:
    for label, _, must in paths.RELATIONS:
        add(
            "P4",
            label,
            "refused; nothing is touched" if must == "refuse" else "nothing is lost",
            relation(label),
        )
    over = [*_prune("-o", "out"), "--overwrite"]
    add(
        "P4",
        "killed between the renames of --overwrite",
        "the next command restores or ends",
        killed_after(
            "prune over another", over, lambda place: not (place.root / "out").exists(), "SIGKILL"
        ),
    )


def _going_on(add: Callable[..., None]) -> None:
    gguf = COMMANDS["prune and GGUF"]
    published = lambda place: (place.root / "out").exists()  # noqa: E731
    for sent in ("SIGKILL", "SIGINT", "SIGTERM", "SIGHUP"):
        add(
            "P5",
            f"{sent} between checkpoint and GGUF",
            "the same command goes on",
            killed_after("prune and GGUF", list(gguf), published, sent),
        )
        add(
            "P5",
            f"{sent} as the result appears",
            "the same command goes on",
            killed_after("prune", list(COMMANDS["prune"]), published, sent),
        )
    add("P5", "two runs with one output", "one says who is at it", together)
    kept = lambda place: any((place.root / "tmp").iterdir())  # noqa: E731
    for sent in ("SIGKILL", "SIGHUP"):
        for name in ("prune", "offload", "plan", "adapter"):
            add(
                "P5",
                f"{sent} with scratch on the disk: {name}",
                "nothing stays",
                killed_after(name, list(COMMANDS[name]), kept, sent),
            )
    for seconds in (0.3, 1.0, 3.0):
        add(
            "P5",
            f"Ctrl-C after {seconds} s",
            "130, no traceback",
            early(list(COMMANDS["prune"]), "SIGINT", seconds),
        )
    for name in ("export", "prune"):
        add(
            "P5",
            f"SIGTERM after 1 s: {name}",
            "cleans up",
            early(list(COMMANDS[name]), "SIGTERM", 1.0),
        )


def _numbers(add: Callable[..., None]) -> None:
    score = canaries.ON_MODELS["score"]
    own = [each.replace("MODEL", "in/tied") for each in score]
    add("P6", "NaN in the final norm: eval --against", REFUSED, one(_nan_norm, must="refuse"))
    add(
        "P6",
        "NaN in the final norm: score",
        REFUSED,
        one(lambda place: _nan_norm(place, *own), must="refuse"),
    )
    add(
        "P6",
        "NaN in the final norm: prune --select recoverable",
        REFUSED,
        one(
            lambda place: _nan_norm(
                place,
                "prune",
                "in/tied",
                "-n",
                "1",
                "--select",
                "recoverable",
                "-d",
                TEXT,
                *QUICK,
                "-o",
                "out",
            ),
            must="refuse",
        ),
    )
    add("P6", "NaN in one token", REFUSED, one(_nan_token, must="refuse"))
    for more in (("--ridge", "inf"), ("--absolute-ridge", "inf"), ("--ridge", "nan")):
        add("P6", " ".join(more), "refused", option(*more))
    add("P6", "ghost:ridge=inf", "refused", option(repair="ghost:ridge=inf"))
    add("P6", "weights of zero, piecewise", "no bug", one(_zeros, truth=None))


def _some_text(index: int, place: Place) -> Plan:
    from faults.kinds import texts

    return texts.make(place, index)


def _texts(add: Callable[..., None]) -> None:
    whole = (SENTENCE * 20).encode() + b"\n\n"
    room = {"limits": {"memory": 1500 << 20}, "seconds": 60.0}
    add("P7", "30 MB of .txt", "in seconds, in 1.5 GB", text(".txt", whole * 30_000, **room))
    add(
        "P7",
        "one line of 60 MB",
        "in seconds, in 1.5 GB",
        text(".txt", SENTENCE.encode() * 1_200_000, "either", **room),
    )
    add("P7", "60 M characters of parquet", "in seconds", dataset("large parquet", ".parquet"))
    rows = "".join(json.dumps({"id": "0c9f" * 8, "conversations": CHAT}) + "\n" for _ in range(90))
    add(
        "P7",
        "conversations beside an id",
        "never the identifiers",
        text(".jsonl", rows.encode(), "either"),
    )
    add(
        "P7",
        "identifiers alone",
        "refused",
        text(".jsonl", json.dumps({"id": "0c9f" * 8}).encode() * 1 + b"\n", "refuse"),
    )
    table = b"text,label\n" + b'"' + SENTENCE.encode() * 3 + b'",1\n' * 1
    for ending, content in {
        ".csv": table * 1 + (b'"' + SENTENCE.encode() * 3 + b'",1\n') * 90,
        ".tsv": b"text\tlabel\n" + (SENTENCE.encode() * 3 + b"\t1\n") * 90,
        ".json.gz": gzip.compress(json.dumps([{"text": SENTENCE * 3}] * 90).encode()),
        ".txt.gz": gzip.compress(whole * 20),
        ".ndjson": LINES,
        ".TXT": whole * 20,
        ", with a comma.txt": whole * 20,
    }.items():
        add("P7", f"a file *{ending}", "read", text(ending, content))
    import zstandard

    add(
        "P7",
        "a file *.jsonl.zst",
        "read",
        text(".jsonl.zst", zstandard.ZstdCompressor().compress(LINES)),
    )
    add("P7", "save_to_disk", "read", dataset("saved"))
    add("P7", "a file *.arrow", "read", dataset("arrow", ".arrow"))
    add("P7", "a folder in a folder", "read", dataset("folder"))
    add("P7", "empty parts of parquet", "read", dataset("parts"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    add("P7", "a pointer of git-lfs as text", "refused", text(".parquet", pointer, "refuse"))
    add("P7", "a pointer of git-lfs as weights", "refused", damaged("a pointer of git-lfs")("eval"))
    from faults.kinds import texts

    names = list(texts.FILES)
    for name in ("a pipe", "a link to zeros"):
        add(
            "P7",
            name,
            "refused",
            one(functools.partial(_some_text, names.index(name)), must="refuse"),
        )
    add("P7", "HF_HOME cannot be made", "works", environment("HF_HOME cannot be made"))


def _messages(add: Callable[..., None]) -> None:
    for value in ("null", "3", "{}", '{"files": 3}'):
        add(
            "P8",
            f"a record that is {value}",
            "no bug",
            file_of("custom/ghostlayers.json", value, ["inspect", "in/custom"], must="refuse"),
        )
    for key in (
        "cut",
        "repairs",
        "evidence",
        "calibration",
        "recipe",
        "verification",
        "files",
        "versions",
        "base_model",
    ):
        for value in (None, 3, "x", []):
            add(
                "P8",
                f"a record whose {key} is {value!r}",
                "no bug",
                record(lambda content, k=key, v=value: content.update({k: v})),
            )
    for name in ("request.json", "*.json"):
        add("P8", f"a comparison whose {name} is cut short", "no bug", _comparison(name))
    for whole in configs.WHOLE:
        add(
            "P8",
            f"config.json is {whole[:20]!r}",
            "no bug",
            file_of("tied/config.json", whole, ["eval", "in/tied", *commands.EVAL], must="refuse"),
        )
    add("P8", "dtype: int8", "no bug", config(dtype="int8"))
    add("P8", "a name of 240 characters", "no bug", option("-o", "o" * 240, must="either"))
    for deep in (
        "[" * 30_000,
        "{" * 3000,
        "command: prune\nlayers: " + "9" * 5000,
        "\0",
        "command: prune\ncommand: eval\nmodel: x",
        "x: [" + "1," * 20_000_000 + "1]\ncommand: prune",
    ):
        add(
            "P8",
            f"a recipe {deep[:24]!r}...",
            "refused, no bug, no hang",
            file_of("r.yaml", deep, ["run", "in/r.yaml"], must="refuse"),
        )
    for value in ("9" * 5000, "1e9", "inf"):
        add("P8", f"--remove {value[:9]}", "no bug", option("--remove", value))
    add("P8", "WORLD_SIZE=abc", "refused", environment("WORLD_SIZE=abc"))
    add(
        "P8",
        "num_hidden_layers: 10^9",
        "refused at once",
        config("refuse", num_hidden_layers=10**9),
    )
    add("P8", "a GGUF of 10^6 blocks", "refused at once", one(_gguf_blocks, must="refuse"))
    add("P8", "piecewise:1000000000", "refused at once", option(repair="piecewise:1000000000"))
    for name in ("a NaN", "an infinity"):
        add(
            "P8",
            f"{name} in the weights: prune",
            "no 'please report'",
            damaged(name)("prune, none"),
        )
    add(
        "P8",
        "out of memory",
        "says what to lower",
        one(
            lambda place: (place.take("tied", "text.txt"), commands.evaluate("in/tied"))[1],
            limits={"memory": 64 << 20},
        ),
    )


def _shown(add: Callable[..., None]) -> None:
    hostile = "\x1b[31mred\x1b]0;x\x07[/x][bold]"
    for key in ("base_model", "versions", "recipe"):

        def change(content: dict[str, Any], key: str = key) -> None:
            if isinstance(content[key], dict):
                content[key] = dict.fromkeys(content[key], hostile)
            else:
                content[key] = hostile

        add(
            "P9",
            f"control characters in a record's {key}: inspect",
            "escaped",
            record(change, interrupted=False),
        )
    from faults.kinds import texts

    index = list(texts.FILES).index("hostile name of a column")
    add(
        "P9",
        "control characters in a column's name",
        "escaped",
        one(lambda place: texts.make(place, index)),
    )

    def licensed(place: Place) -> Plan:
        folder = place.take("tied", "text.txt")
        card = "---\nlicense: '<script>alert(1)</script>'\n---\n# <script>alert(1)</script>\n"
        (folder / "README.md").write_text(card)
        return by_name("prune, none", "in/tied")

    add("P9", "a licence that is HTML", "escaped", then(one(licensed, truth=None), _plain_card))
    for name in (
        "modeling_ghostlayers.py",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    ):
        add("P9", f"push of a changed {name}", "refused", pushed(name))

    def absolute(place: Place) -> Plan:
        place.take("tied", "text.txt")
        path = str(place.inputs / "text.txt")
        plan = by_name("compare", "in/tied")
        plan.arguments = [path if each == TEXT else each for each in plan.arguments]
        plan.truth = None
        return plan

    add("P9", "absolute paths in a comparison's page", "none", then(one(absolute), _no_paths))


def carry_out(lane: Lane, listed: Listed, number: int) -> Verdict:
    """One row."""
    place = lane.place("listed", random.Random(number))
    try:
        return listed.attempt(lane, place)
    except Exception as error:
        return Verdict("campaign", f"{type(error).__name__}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.listed", description=__doc__)
    parser.add_argument("--table", type=Path, help="write the table into this file")
    parser.add_argument("--only", action="append", help="rows whose text holds this")
    asked = parser.parse_args()
    lines = ["| promise | input | wanted | seen |", "|---|---|---|---|"]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="listed-") as home:
        lane = Lane(Path(home) / "lane", Path(home) / "templates")
        try:
            make_templates(lane)
            for number, each in enumerate(rows()):
                name = f"{each.promise} {each.input}"
                if asked.only and not any(part in name for part in asked.only):
                    continue
                found = carry_out(lane, each, number)
                wrong += found.kind not in ("ok", "clean")
                lines.append(line(each, found))
                print(lines[-1], file=sys.stderr, flush=True)
        finally:
            lane.close()
    total = len(lines) - 2
    lines += ["", f"{total - wrong} of {total} as wanted."]
    content = "\n".join(lines) + "\n"
    print(content)
    if asked.table:
        asked.table.write_text(content)
    return int(wrong > 0)


def line(listed: Listed, found: Verdict) -> str:
    """A row of the table."""
    words = {"ok": "right", "clean": "right: refused"}.get(found.kind, f"**{found.kind}**")
    reason = " ".join(found.reason.split())[:160].replace("|", "\\|")
    name = listed.input.encode("unicode_escape").decode().replace("|", "\\|")
    return (
        f"| {listed.promise} | {name} | {listed.wanted} | {words}{': ' if reason else ''}{reason} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())

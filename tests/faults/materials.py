"""What the campaign damages: tiny models, results made of them, texts, task files."""

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.zygote import OURS

QUICK = ["--windows", "8", "--fit-windows", "4", "--held-out-windows", "2"]
QUICK += ["--sequence-length", "32", "--device", "cpu"]
"""As little calibration as a repair of the tiny model needs."""


def make_all(folder: str) -> None:
    """Every template but those that the command line makes (`RESULTS`)."""
    from conftest import make_byte_tokenizer, make_documents, make_tiny_llama

    _make_in(Path(folder), make_byte_tokenizer, make_documents, make_tiny_llama)


WIDE = {"seed": 4, "num_hidden_layers": 5, "hidden_size": 128, "intermediate_size": 256}
"""Of a model whose file is split where every megabyte ends."""


def _make_in(folder: Path, make_byte_tokenizer, make_documents, make_tiny_llama) -> None:
    from packers import pack_folder

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_byte_tokenizer(bos=False)
    # Wide weights: what is wrong then shows in the loss, which of a usual random model is log 256.
    wide = {"seed": 3, "num_hidden_layers": 5, "initializer_range": 0.3}
    for name, changes in (("tied", {}), ("untied", {"tie_word_embeddings": False})):
        model = make_tiny_llama(**wide, **changes)
        model.save_pretrained(folder / name)
        _save_tokenizer(tokenizer, folder / name)
    parts = make_tiny_llama(**WIDE)
    parts.save_pretrained(folder / "wide")
    _save_tokenizer(tokenizer, folder / "wide")
    few = make_tiny_llama(**{**wide, "hidden_size": 64, "intermediate_size": 64}).half()
    few.save_pretrained(folder / "packed")
    _save_tokenizer(tokenizer, folder / "packed")
    pack_folder(folder / "packed", "gptq")
    half = make_tiny_llama(**wide).bfloat16()
    half.save_pretrained(folder / "bfloat16")
    _save_tokenizer(tokenizer, folder / "bfloat16")
    (folder / "text.txt").write_text("\n\n".join(make_documents(60)), encoding="utf-8")
    (folder / "tasks").mkdir(exist_ok=True)
    _write_task(folder / "tasks")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """With one merge: transformers reads none from a GGUF without."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["th"] = words.pop(max(words, key=lambda word: words[word]))
    content["model"]["merges"] = [["t", "h"]]
    path.write_text(json.dumps(content))


def _write_task(folder: Path) -> None:
    rows = [
        {"q": f"{n}. The river", "choices": ["carries", "watches"], "label": n % 2}
        for n in range(6)
    ]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "some.yaml").write_text(
        "task: some\ndataset_path: json\ndataset_kwargs:\n"
        "  data_files: {test: in/tasks/some.jsonl}\n  cache_dir: cache\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
        "metric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"
    )


PARTS = tuple(f"out-{n:05d}-of-{of:05d}.gguf" for of in (2, 3, 4) for n in range(1, of + 1))
OUTPUTS = ("out", "out.json", "out.png", "out.gguf", *PARTS)
"""What commands are told to make."""

RESULTS = {
    "custom": [
        "prune",
        "in/tied",
        "--remove",
        "2-3",
        "--repair",
        "ghost",
        "-d",
        "in/text.txt",
        *QUICK,
    ],
    "stock": [
        "prune",
        "in/tied",
        "--remove",
        "2-3",
        "--repair",
        "none",
        "-d",
        "in/text.txt",
        *QUICK,
    ],
    "adapter": [
        *("prune", "in/tied", "--remove", "2-3", "--repair", "ghost", "-d", "in/text.txt", *QUICK),
        *("--save", "adapter"),
    ],
    "model.gguf": ["export", "in/stock", "--pre-tokenizer", "gpt-2", "--gguf"],
    "whole.gguf": ["export", "in/tied", "--pre-tokenizer", "gpt-2", "--gguf"],
    "wide.gguf": ["export", "in/wide", "--pre-tokenizer", "gpt-2", "--gguf"],
    "compared": [
        *("compare", "in/tied", "-n", "1", "--select", "angular", "--repair", "none,ghost"),
        *("-d", "in/text.txt", "--eval-data", "in/text.txt", "--max-windows", "2"),
        *("--no-speed", *QUICK),
    ],
}
"""Templates that the command line makes; each command lacks its output."""


def command_of(name: str) -> list[str]:
    """The whole command that makes a template, in the folder of the templates."""
    last = RESULTS[name]
    return [*last, f"in/{name}"] if last[-1] == "--gguf" else [*last, "-o", f"in/{name}"]


@dataclass
class Place:
    """Where one fault happens.

    Attributes:
        root: the folder in which the command starts.
        templates: what can be copied here.
        rng: of this fault alone.
        environment: what the command is started with.
    """

    root: Path
    templates: Path
    rng: random.Random
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> Path:
        """Everything that must be as it was afterwards."""
        return self.root / "in"

    @property
    def marker(self) -> Path:
        """What code leaves when it runs, which it must not."""
        return self.root / "marker"

    def take(self, *names: str) -> Path:
        """Copy templates here; the first one's path."""
        self.inputs.mkdir(exist_ok=True)
        for name in names:
            source, target = self.templates / name, self.inputs / name
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            if not target.exists():
                copy(source, target)
        return self.inputs / names[0]

    def edit_json(self, path: Path, **changes: Any) -> None:
        """Set or, with ``...``, remove keys of a file."""
        content = json.loads(path.read_text())
        for key, value in changes.items():
            if value is ...:
                content.pop(key, None)
            else:
                content[key] = value
        path.write_text(json.dumps(content))


def digest(folder: Path) -> dict[str, str]:
    """Every file, link and folder below one, by what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def left_behind(root: Path, allowed: Iterable[str]) -> list[str]:
    """What lies in a place that was not there and was not asked for; empty locks count not."""
    known = {"in", "tmp", "said", "home", "marker", "cache", *allowed}
    found = [path.name for path in root.iterdir() if path.name not in known]
    found += [
        f"tmp/{path.name}"
        for path in (root / "tmp").iterdir()
        if not path.name.startswith(("torchinductor_", OURS))  # torch's own cache, and ours
        and not _is_probe(path)
    ]
    return sorted(name for name in found if not _is_lock(root / name))


def _is_probe(path: Path) -> bool:
    """Whether it is Python's own look at whether a temporary folder can be written."""
    return len(path.name) == 8 and path.is_file() and path.stat().st_size <= 4


def _is_lock(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.suffix == ".lock" and path.stat().st_size < 200
    return False


@dataclass
class Plan:
    """What is started in a place, and what may come of it.

    Attributes:
        arguments: of the command line.
        label: what was done to the input.
        must: "refuse" where success is wrong, "succeed" where refusal is, "either".
        truth: a folder whose loss the result must agree with, as far as it has one.
        drop: layers that the result lacks; then it is a model, and its loss is compared.
        made: the result.
        outputs: what may lie there afterwards.
        there: what lay beside the inputs before.
        limits: of memory and file sizes.
        hook: where to interrupt, or to fail a change of a folder.
        seconds: after which it hangs.
        foreign: code lies about, none of which may be in a result.
        interrupted: parts that wait for the next command may stay.
    """

    arguments: Sequence[str]
    label: str
    must: str = "either"
    truth: str | None = None
    drop: list[int] = field(default_factory=list)
    made: str = "out"
    outputs: tuple[str, ...] = OUTPUTS
    there: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
    hook: dict[str, Any] | None = None
    seconds: float = 60.0
    foreign: bool = False
    interrupted: bool = False

"""Outputs that are inputs, or lie in them, or are no files."""

import os

from faults.kinds import gguf_files
from faults.kinds.commands import EVAL, TEXT
from faults.materials import OUTPUTS, QUICK, Place, Plan

PRUNE = ["prune", "in/tied", "--remove", "2-3", "--repair", "none", "-d", TEXT, *QUICK]
EVALUATE = ["eval", "in/tied", *EVAL[:-2], "--device", "cpu"]


def make(place: Place, index: int) -> Plan:
    """One relation between an output and what is there."""
    place.take("tied", "text.txt", "custom", "adapter", "model.gguf", "stock", "compared")
    gguf_files.in_parts(place.take("whole.gguf"))
    _link(place, "link-to-model.gguf", "in/model.gguf")
    _link(place, "link-to-part.gguf", "in/parts-00002-of-00002.gguf")
    _link(place, "link-to-notes.gguf", "in/text.txt")
    label, arguments, must = RELATIONS[index % len(RELATIONS)]
    (place.inputs / "notes").mkdir()
    (place.inputs / "notes" / "thesis.txt").write_text("years of work")
    _link(place, "link-to-model", "in/tied")
    _link(place, "link-to-inputs", "in")
    _link(place, "in/dangling", "nowhere")
    (place.inputs / "custom" / "checkpoint-500").mkdir()
    (place.inputs / "custom" / "checkpoint-500" / "mine.bin").write_text("trained for a week")
    (place.root / ".out.json.part").symlink_to("in/notes/thesis.txt")
    plan = Plan(arguments, label, must=must, outputs=(*OUTPUTS, "nowhere"))
    plan.interrupted = must == "either"
    return plan


def _link(place: Place, name: str, target: str) -> None:
    path = place.root / name
    path.symlink_to(os.path.relpath(place.root / target, path.parent))


CUT = ["--remove", "1", "--repair", "none", "-d", TEXT, *QUICK, "--overwrite"]
ONE = "in/parts-00001-of-00002.gguf"
RELATIONS = [
    (f"a GGUF of a GGUF, output {name}", ["prune", model, *CUT, "-o", out, *more], must)
    for name, model, out, more, must in [
        ("is the input", "in/model.gguf", "in/model.gguf", [], "refuse"),
        ("is the input, in parts", "in/model.gguf", "in/model.gguf", ["--gguf-split", "1M"],
         "refuse"),
        ("is the input through a link", "in/model.gguf", "link-to-model.gguf", [], "refuse"),
        ("is another part of it", ONE, "in/parts-00002-of-00002.gguf", [], "refuse"),
        ("is another part through a link", ONE, "link-to-part.gguf", [], "refuse"),
        ("has parts of the same names", ONE, "in/parts.gguf", ["--gguf-split", "1M"], "refuse"),
        ("is a link to something else", "in/model.gguf", "link-to-notes.gguf", [], "either"),
        ("is the text", "in/model.gguf", "in/text.txt", [], "refuse"),
        ("is a folder", "in/model.gguf", "in/notes", [], "refuse"),
        ("lies in a file", "in/model.gguf", "in/text.txt/out.gguf", [], "refuse"),
        ("is a plain file", "in/model.gguf", "out.gguf", [], "either"),
    ]
] + [
    ("eval, --json is a part of the model", ["eval", ONE, *EVAL[:-2], "--device", "cpu", "--json",
                                             "in/parts-00002-of-00002.gguf"], "refuse"),
] + [
    (f"prune, output {name}", [*PRUNE, "-o", out, "--overwrite"], "refuse")
    for name, out in {
        "is the model": "in/tied",
        "is the model through a link": "link-to-model",
        "contains the model": "in",
        "contains the model through a link": "link-to-inputs",
        "lies in the model": "in/tied/out",
        "is the text": "in/text.txt",
        "is a file": "in/notes/thesis.txt",
        "is a folder of notes": "in/notes",
        "is a result with other things in it": "in/custom",
        "is the model, written otherwise": "in/../in/./tied/",
        "is here": ".",
        "is the root": "/",
        "is a device": "/dev/null",
        "is in a file": "in/text.txt/out",
        "is a dangling link": "in/dangling",
        "is too long": "o" * 300,
        "is empty": "",
        "holds control characters": "o\x01ut/\x1b[31m",
    }.items()
] + [
    (f"eval, --json {name}", [*EVALUATE, "--json", out], must)
    for name, out, must in [
        ("is the config", "in/tied/config.json", "refuse"),
        ("is the weights", "in/tied/model.safetensors", "refuse"),
        ("is the text", "in/text.txt", "refuse"),
        ("is a file of notes", "in/notes/thesis.txt", "refuse"),
        ("is a folder", "in/notes", "refuse"),
        ("is a device", "/dev/null", "either"),
        ("is full", "/dev/full", "refuse"),
        ("is in no folder", "in/none/out.json", "refuse"),
        ("is a plain file", "out.json", "either"),
        ("is a dangling link", "in/dangling", "refuse"),
    ]
] + [
    ("score, --png is the text", ["score", "in/tied", "-n", "1", "-d", TEXT, *QUICK[:2], "--png",
                                  "in/text.txt", "--sequence-length", "32"], "refuse"),
    ("materialize onto itself", ["materialize", "in/adapter", "-o", "in/adapter", "--overwrite",
                                 "--base", "in/tied"], "refuse"),
    ("materialize onto its base", ["materialize", "in/adapter", "-o", "in/tied", "--overwrite",
                                   "--base", "in/tied"], "refuse"),
    ("a GGUF onto itself", ["prune", "in/model.gguf", "--remove", "1", "--repair", "none",
                            "-d", TEXT, *QUICK, "-o", "out", "--pre-tokenizer", "gpt-2", "--gguf",
                            "in/model.gguf", "--overwrite"],
     "refuse"),
    ("export onto its own weights", ["export", "in/stock", "--gguf",
                                     "in/stock/model.safetensors", "--overwrite"], "refuse"),
    ("compare onto the model", ["compare", "in/tied", "-n", "1", "-d", TEXT, "--eval-data", TEXT,
                                *QUICK, "-o", "in/tied", "--overwrite"], "refuse"),
    ("compare onto a folder of notes", ["compare", "in/tied", "-n", "1", "-d", TEXT, "--eval-data",
                                        TEXT, *QUICK, "-o", "in/notes", "--overwrite"], "refuse"),
]  # fmt: skip

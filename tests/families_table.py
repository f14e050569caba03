"""Write ``docs/reference/families.md`` from what the contract suite builds. Run as a program."""

import re
from pathlib import Path
from typing import Any

import transformers

import seeing
from families import FAMILIES, PATTERNED, build
from ghostlayers.model.anatomy import Anatomy
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.families import REFUSED, REFUSED_IF
from ghostlayers.model.multimodal import text_view

PATH = Path(__file__).parent.parent / "docs" / "reference" / "families.md"

HEAD = """# Families

Written by `python tests/families_table.py` with transformers VERSION; `tests/test_contract.py`
fails when it is out of date, and holds every family in it to the same contract: an empty cut
changes nothing; a repaired cut is the dense model with layers skipped; the config alone says what
the layers are; a stranger's process loads it with `trust_remote_code`, and importing this package
is enough without; the stock class refuses it; cached generation is uncached generation, behind
left padding too; sampling works; ties stay ties. `tests/test_stream.py` holds them to the other
half: the sweep is the model, bit for bit.

Other families are not refused for being unknown. A cut is made wherever the model, built anew from
its rewritten config, has the very layers that stayed; anything else is refused with the first
difference.

**folds** names the projection that `refit`, `replaceme` and the z of `joint` are folded into. Where
it says "experts", their sum takes the place of z, and one map of it is folded into each of them, so
that `refit:1` is `replaceme`. Where it says "with its norm", a norm stands between it and the
stream, through which no linear map folds; `refit` fits both, and nothing else folds. "no" means
that the layers are built otherwise, and repairs on the stream (`ghost`, `normed`, `joint:x+norm`,
`piecewise`, `linearpatch`) are what there is. **cuts**: "any" layers, or only those that keep to a
formula of the layer index.

| model type | class | folds | cuts |
|---|---|---|---|
"""


SEEING = """
## Vision-language models

Their text part is cut, and the whole model is saved: image tower, projector, processor files and
chat template as they were, the names of tensors and classes, and a config whose `text_config`
describes the layers that stay. Calibration, scores and losses are of text alone. A folder opens
with `AutoModelForImageTextToText` and `AutoProcessor`, as its base does. `tests/test_multimodal.py`
cuts each of these, asks a fresh process about an image, and finds the logits of the model in
memory, the tower bit for bit, and cached generation equal to uncached.

Any other family of images and text is treated the same, if its config holds a decoder-only
`text_config`. Repairs have to fold (`refit:3:ridge=auto` is nearest to `ghost`): operators are
refused before anything is computed, and only `compare` measures them. Where features of the image
are added behind the first decoder layers by their numbers (Qwen 3-VL), those layers stay. Families
whose text part is an encoder and a decoder, reads in both directions (PaliGemma) or has layers for
the image alone (Llama 3.2 Vision) are refused, as is GGUF: llama.cpp's own converter writes the two
files of such a folder. transformers 5.24 cannot run the whole of a Llama 4, cut or not: its forward
pass stops while it names its outputs.

| model type | class | text part | folds |
|---|---|---|---|
"""


def written_with() -> str:
    """The version of transformers that the page was written with."""
    match = re.search(r"with transformers ([\w.]+);", PATH.read_text(encoding="utf-8"))
    return match.group(1) if match else ""


def row(name: str) -> str:
    model = build(name)
    cuts = "only some" if name in PATTERNED else "any"
    return f"| `{name}` | {type(model).__name__} | {folds_of(model)} | {cuts} |"


def seeing_row(name: str) -> str:
    view = text_view(seeing.build(name))
    kinds = [type(part).__name__ for part in (view.whole, view.text_part)]
    return f"| `{name.split()[0]}` | {' | '.join(kinds)} | {folds_of(view)} |"


def folds_of(model: Any) -> str:
    """What repairs fold into."""
    anatomy = DenseModel(model).anatomy_or_reason
    if isinstance(anatomy, Anatomy) and anatomy.mlp_post_norm:
        folds = f"`{anatomy.mlp_output}` with its norm"
    elif isinstance(anatomy, Anatomy) and not anatomy.post_norms:
        folds = f"`{anatomy.mlp_output}`"
        if anatomy.experts:
            folds += " (experts)"
        if anatomy.write_scale != 1.0:
            folds += " (rescaled)"
    else:
        folds = "no (norm)" if isinstance(anatomy, Anatomy) else "no"
    return folds


def render() -> str:
    """The whole page."""
    rows = [row(name) for name in sorted(FAMILIES)]
    refused = [f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items())]
    refused += [f"| any, `{name}` set | {reason} |" for name, reason in sorted(REFUSED_IF.items())]
    sight = [seeing_row(name) for name in sorted(seeing.FAMILIES) if name != "paligemma"]
    seen = SEEING + "\n".join(sight) + "\n"
    tail = (
        seen + "\n## Refused\n\n| model type | because |\n|---|---|\n" + "\n".join(refused) + "\n"
    )
    head = HEAD.replace("VERSION", transformers.__version__)
    return head + "\n".join(rows) + "\n" + tail


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")

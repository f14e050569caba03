"""Load a checkpoint as a stranger would and write down what it gives. Run as a program.

usage: python reload_check.py [REQUEST.json]

Without a request it waits for the name of one on its standard input.

The request names the folder and a file for the answer, with token ids to run, a text to tokenise, a
type to compute in, a device, whether the model sees images, too, whether it is loaded once, as its
files are (and not again in the type to compute in), how many bytes of weights may be
in memory (0 for all), and the hash of the one file of code that may run (none for a stock
checkpoint, of which no code runs).

It imports torch, transformers and safetensors, never ghostlayers: it finds what anyone gets. First
it loads as the card says, in the type that the file has; then, if that is another, in the type that
the model in memory computes in.
"""

import contextlib
import ctypes
import gc
import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Any


def end_with_parent() -> None:
    """Be killed when whoever started this is, where the system can do that (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    gc.disable()  # a third of the time of what follows

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

BEHIND_ALL_MODELS = (GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast)
"""Named so that they are imported before a request comes: transformers imports what is asked for,
and these take seconds."""

CODE = "modeling_ghostlayers.py"


def main(request: str) -> None:
    """Load, run the token ids, save the logits and the text's tokens."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    how = {"local_files_only": True, **allowed(Path(asked["folder"]), asked["code"])}
    tokens = []
    if asked["text"]:
        tokens = AutoTokenizer.from_pretrained(asked["folder"], **how)(asked["text"])["input_ids"]
    ids = torch.tensor([asked["ids"]])
    computed = getattr(torch, asked["dtype"])
    tensors: dict[str, torch.Tensor] = {"tokens": torch.tensor(tokens, dtype=torch.long)}
    types: dict[str, str] = {}
    if asked["room"]:
        model = load(asked, dtype=computed, **how, **elsewhere(asked))
    else:
        model = load(asked, **how)
        types = {name: str(weight.dtype) for name, weight in model.named_parameters()}
        tensors["as_read"] = logits_of(model, ids, asked)
        if model.dtype != computed and not asked["once"]:
            del model
            model = load(asked, dtype=computed, **how)
    if not asked["once"]:
        tensors["logits"] = logits_of(model, ids, asked)
    save_file(tensors, asked["answer"], metadata={"types": json.dumps(types)})
    assert "ghostlayers" not in sys.modules


def allowed(folder: Path, code: str | None) -> dict[str, Any]:
    """Trust in the folder's code, if it is the one file that may run and no other is named."""
    if code is None:
        return {}
    digest = hashlib.sha256((folder / CODE).read_bytes()).hexdigest()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    modules = {name.rpartition(".")[0] for name in config["auto_map"].values()}
    if digest != code or modules != {CODE.removesuffix(".py")}:
        raise ValueError(f"the folder's code is not the {CODE} that was written")
    return {"trust_remote_code": True}


def elsewhere(asked: dict[str, Any]) -> dict[str, Any]:
    """Weights beyond the room that there is lie on disk."""
    device, room = asked["device"], asked["room"]
    place = 0 if torch.device(device).index is None else torch.device(device).index
    limits = {"cpu": room} if device == "cpu" else {place: room, "cpu": room}
    folder = f"{asked['answer']}.offload"
    return {"device_map": "auto", "max_memory": limits, "offload_folder": folder}


def load(asked: dict[str, Any], **how: Any) -> Any:
    """The model; where it computes, unless its weights lie in several places."""
    auto = AutoModelForImageTextToText if asked["sees"] else AutoModelForCausalLM
    model = auto.from_pretrained(asked["folder"], **how).eval()
    placed = asked["room"] or asked["once"]
    return model if placed else model.to(torch.device(asked["device"]))


def logits_of(model: Any, ids: torch.Tensor, asked: dict[str, Any]) -> torch.Tensor:
    """Of every token."""
    # Llama 4's text part has a head of its own, and the whole cannot run in transformers 5.24.
    part = model.get_decoder() if asked["sees"] else model
    speaker = model if part.get_output_embeddings() is None else part
    with torch.no_grad():
        logits = speaker(input_ids=ids.to(asked["device"]), use_cache=False).logits
    return logits.float().cpu().contiguous()  # type: ignore[no-any-return]


if __name__ == "__main__":
    gc.enable()
    named = sys.argv[1] if len(sys.argv) > 1 else sys.stdin.readline().strip()
    if named:  # else whoever would have asked is gone
        main(named)
    gc.freeze()  # nothing is looked for among all that as the interpreter ends

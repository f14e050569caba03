"""Load checkpoints as a stranger would, and write down their logits. Run as a program.

usage: python stranger.py FOLDER_OF_CHECKPOINTS IDS.safetensors ANSWERS.safetensors

It imports torch, transformers and safetensors, never ghostlayers.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM


def refused_by_stock_class(folder: Path) -> bool:
    """Whether the family's own class, called by name, stops instead of running unrepaired."""
    parent = AutoConfig.from_pretrained(folder, trust_remote_code=True).__class__.__mro__
    names = [each.__name__ for each in parent if each.__module__.startswith("transformers.models")]
    config = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    model = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[config]
    try:
        model.from_pretrained(folder)
    except Exception:
        return True
    return False


def main(folder: str, request: str, answer: str) -> None:
    ids = load_file(request)["input_ids"]
    found = {}
    for path in sorted(Path(folder).iterdir()):
        try:
            model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
            with torch.no_grad():
                found[path.name] = model(input_ids=ids, use_cache=False).logits.contiguous()
        except Exception as error:
            print(f"{path.name}: {type(error).__name__}: {error}")  # its test then lacks an answer
            continue
        if "repaired" in path.name:
            found[f"{path.name} refused"] = torch.tensor(refused_by_stock_class(path))
    save_file(found, answer)
    assert "ghostlayers" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])

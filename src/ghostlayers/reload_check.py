"""Load a checkpoint as a stranger would and write down its logits. Run as a program.

usage: python reload_check.py CHECKPOINT REQUEST.safetensors ANSWER.safetensors DTYPE DEVICE ROOM

ROOM is how many bytes of weights may be in memory; 0 for all.

It imports torch, transformers and safetensors, never ghostlayers: it finds what anyone gets.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def main(checkpoint: str, request: str, answer: str, dtype: str, device: str, room: str) -> None:
    """Load, run the token ids of the request, save the logits."""
    elsewhere: dict[str, Any] = {}
    if int(room):
        place = 0 if torch.device(device).index is None else torch.device(device).index
        limits = {"cpu": int(room)} if device == "cpu" else {place: int(room), "cpu": int(room)}
        folder = f"{answer}.offload"
        elsewhere = {"device_map": "auto", "max_memory": limits, "offload_folder": folder}
    config = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    model = auto.from_pretrained(
        checkpoint,
        dtype=getattr(torch, dtype),
        trust_remote_code=True,
        local_files_only=True,
        **elsewhere,
    ).eval()
    if not elsewhere:
        model.to(torch.device(device))
    ids = load_file(request)["input_ids"].to(device)
    with torch.no_grad():
        logits = _logits(model, ids, whole="text_config" in config)
    save_file({"logits": logits.float().cpu().contiguous()}, answer)
    assert "ghostlayers" not in sys.modules


def _logits(model: Any, ids: torch.Tensor, *, whole: bool) -> torch.Tensor:
    # Llama 4's text part has a head of its own, and the whole cannot run in transformers 5.24.
    part = model.get_decoder() if whole else model
    speaker = model if part.get_output_embeddings() is None else part
    logits: torch.Tensor = speaker(input_ids=ids, use_cache=False).logits
    return logits


if __name__ == "__main__":
    main(*sys.argv[1:])

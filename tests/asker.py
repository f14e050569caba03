"""Ask vision-language models about an image, as a stranger would. Run as a program.

usage: python asker.py FOLDER_OF_CHECKPOINTS REQUEST.pt ANSWERS.pt

It imports torch and transformers, never ghostlayers. The request holds the inputs of every
checkpoint by its name; the answers are logits, and tokens with and without a cache.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

PATCHES = [250, 251, 252, 253, 256]
"""Tokens that stand for parts of an image, which no model should say."""


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits on an image and words.

    Llama 4 in transformers 5.24 fails to name its outputs, unless it is to give none.
    """
    named, model.config.return_dict = model.config.return_dict, model.config.model_type != "llama4"
    with torch.no_grad():
        outputs = model(**inputs, use_cache=False, return_dict=True)
    model.config.return_dict = named
    return outputs[0]


def tokens_of(model: Any, inputs: dict[str, torch.Tensor], *, cached: bool) -> torch.Tensor:
    """What a model says greedily; of Llama 4 (see above) only to words."""
    if model.config.model_type == "llama4":
        model, inputs = model.language_model, {"input_ids": inputs["input_ids"]}
    return model.generate(
        **inputs,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        use_cache=cached,
        suppress_tokens=PATCHES,
    )


def main(folder: str, request: str, answer: str) -> None:
    found = {}
    for name, inputs in torch.load(request, weights_only=False).items():
        path = Path(folder) / name
        if "images" in inputs:  # a picture and words: the processor's
            inputs = dict(AutoProcessor.from_pretrained(path)(**inputs, return_tensors="pt"))
        model = AutoModelForImageTextToText.from_pretrained(path).eval()
        found[name] = {
            "logits": logits_of(model, inputs),
            "cached": tokens_of(model, inputs, cached=True),
            "uncached": tokens_of(model, inputs, cached=False),
        }
    torch.save(found, answer)
    assert "ghostlayers" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])

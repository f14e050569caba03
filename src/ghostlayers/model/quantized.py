"""Checkpoints whose weights are quantised: which can be read, and what is said of them.

A cut and its repair need weights to compute with. So packed weights are expanded to what their
numbers stand for as a model is opened (see `expanding`), and activations are not quantised any
more. What is written may hold them packed again, as they were (see `checkpoint.packed`).
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.integer_layouts import Awq, Gptq
from ghostlayers.model.layouts import Layout
from ghostlayers.model.library_layouts import BitsAndBytes, BlockScaled, CompressedTensors, Mxfp4

LAYOUTS: dict[str, type[Layout]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
    "fp8": BlockScaled,
    "mxfp4": Mxfp4,
}
"""Formats that are known, by what a config calls them."""

READERS = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("bitsandbytes",),
}
"""What transformers needs to open a packed model as it is."""

ENTRY = "quantization_config"
"""Where a config speaks of it."""


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The format that a config.json names; None if its weights are plain.

    Args:
        config: the dictionary in the file.
    """
    settings = config.get(ENTRY)
    if not isinstance(settings, Mapping):
        return None
    named = settings.get("quant_method")
    if named is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return "bitsandbytes"
    return str(named or "unknown")


def check_quantization(config: Mapping[str, Any]) -> None:
    """Refuse a format that cannot be expanded, from the config alone.

    Args:
        config: the dictionary in the file.

    Raises:
        UnsupportedModelError: the format is unknown, or its library is missing; the message names
            the way out.
    """
    method = quantization_method(config)
    if method is None:
        return
    if method not in LAYOUTS:
        raise UnsupportedModelError(
            f"the model's weights are quantised as '{method}', which cannot be expanded to plain "
            f"weights here; expected one of {', '.join(LAYOUTS)}, a .gguf file, or no "
            "quantisation. Start from the checkpoint that was quantised, in bfloat16 or float16, "
            "and quantise the result."
        )
    library = layout_of(config).library
    if library is not None and not _is_installed(library):
        raise UnsupportedModelError(
            f"the model's weights are quantised as '{method}', and expanding them needs a library "
            f"that is not installed: pip install {library.replace('_', '-')}. Or start from the "
            "checkpoint that was quantised."
        )


def layout_of(config: Mapping[str, Any]) -> Layout:
    """How a quantised model's files hold its weights.

    Args:
        config: the dictionary in the file; of a format that is known.

    Raises:
        UnsupportedModelError: in a form of the format that is not.
    """
    return LAYOUTS[str(quantization_method(config))](config[ENTRY])


def is_readable(config: Mapping[str, Any]) -> bool:
    """Whether transformers can open a model here as it is."""
    method = quantization_method(config)
    return method is None or all(map(_is_installed, READERS.get(method, ())))


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def expand(model: PreTrainedModel, stored: torch.dtype) -> Any:
    """A model that transformers expanded, with weights rounded as a checkpoint will hold them.

    Args:
        model: as loaded from a GGUF file.
        stored: the type of the checkpoint to come.
    """
    computes_in = model.dtype
    forget_quantization(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).to(computes_in)
    return model


def expanded(method: str) -> str:
    """What happened to the weights, for people to read."""
    return f"quantised as {method}. What they stand for is computed with."


def forget_quantization(model: Any) -> None:
    """Drop what expanding leaves: save_pretrained would refuse, or pack the weights again."""
    if hasattr(model.config, ENTRY):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model._weight_conversions = None  # transformers then takes those of the family alone

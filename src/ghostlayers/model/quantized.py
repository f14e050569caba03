"""Checkpoints whose weights are quantised: expanded as they are read, or refused before.

A cut and its repair need weights to compute with and to write. Where transformers can turn a format
back into plain weights, it does so on loading, and the new checkpoint holds plain weights; its
skip lists then have nothing left to name. Activations are not quantised any more.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from ghostlayers.errors import UnsupportedModelError

LIBRARIES: dict[str, str | None] = {
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "fp8": None,
    "mxfp4": None,
}
"""Formats that can be expanded, and the library that transformers needs for it."""


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The format that a config.json names; None if its weights are plain.

    Args:
        config: the dictionary in the file.
    """
    settings = config.get("quantization_config")
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
    if method not in LIBRARIES:
        raise UnsupportedModelError(
            f"the model's weights are quantised as '{method}', which transformers cannot expand to "
            f"plain weights; expected one of {', '.join(LIBRARIES)}, a .gguf file, or no "
            "quantisation. Start from the checkpoint that was quantised, in bfloat16 or float16, "
            "and quantise the result."
        )
    library = LIBRARIES[method]
    if library is not None and importlib.util.find_spec(library) is None:
        raise UnsupportedModelError(
            f"the model's weights are quantised as '{method}', and expanding them needs a library "
            f"that is not installed: pip install {library.replace('_', '-')}. Or start from the "
            "checkpoint that was quantised."
        )


def loading_options(config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that make transformers expand the weights.

    Args:
        config: the dictionary in the file, already checked.
        device: where the model is to be.
    """
    from transformers.utils import quantization_config as known

    method = quantization_method(config)
    if method == "bitsandbytes":  # expanded afterwards, see `expand`
        return {"device_map": {"": device}}
    classes = {
        "compressed-tensors": known.CompressedTensorsConfig,
        "fp8": known.FineGrainedFP8Config,
        "mxfp4": known.Mxfp4Config,
    }
    return {} if method is None else {"quantization_config": classes[method](dequantize=True)}


def expand(model: Any, stored: torch.dtype) -> Any:
    """The model with plain weights, rounded as a checkpoint will hold them.

    Args:
        model: as loaded with `loading_options`.
        stored: the type of the checkpoint to come.
    """
    computes_in = model.dtype
    settings = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if hasattr(settings, "load_in_4bit"):  # bitsandbytes, which loads packed
        model = model.dequantize(computes_in)
    forget_quantization(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).to(computes_in)
    return model


def expanded(method: str) -> str:
    """What happened to the weights, for people to read."""
    return (
        f"quantised as {method}. They are expanded now, and a checkpoint made of them holds plain "
        "weights; quantise it again afterwards."
    )


def forget_quantization(model: Any) -> None:
    """Drop what expanding leaves: save_pretrained would refuse, or pack the weights again."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model._weight_conversions = None  # transformers then takes those of the family alone

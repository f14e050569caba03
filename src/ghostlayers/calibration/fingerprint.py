"""What a run's sums depend on, in a few strings: two runs with equal ones may share them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostlayers.calibration.journal import digest
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.runtime.machine import versions
from ghostlayers.runtime.parallel import world
from ghostlayers.text.tokens import Windows

BLOCK = 2**16
"""Bytes that are read at a place of a file."""

PLACES = 256
"""Places at which a file of weights is read."""

WEIGHTS = ("*.safetensors", "*.gguf")


def run_request(
    loaded: DenseModel, recipe: Recipe, windows: Windows, options: RunOptions
) -> dict[str, Any]:
    """All that the sums of a run depend on.

    The same request on another number of processes adds the same sums up in another order, and on
    another version of torch perhaps by another kernel, so these belong to it.
    """
    ids = windows.input_ids
    return {
        "recipe": recipe.to_dict(),
        "model": model_fingerprint(loaded),
        "text": digest(str(tuple(ids.shape)), ids.contiguous().numpy().tobytes()),
        "dtype": str(loaded.network.dtype),
        "device": torch.device(loaded.network.device).type,
        "batch_size": options.batch_size,
        "offload": [options.offload, options.max_memory],
        "processes": world().size,
        "versions": versions(),
    }


def model_fingerprint(loaded: DenseModel) -> str:
    """A digest of a model's weights, in a second or two whatever their size.

    Of files it takes names, sizes and blocks at many places; of a model in memory names, shapes
    and some numbers of every weight. Another training step changes nearly all of these.
    """
    config = _config_text(loaded.network.config)
    files = _weight_files(loaded.base.folder or Path(loaded.base.name))
    if files:
        return digest(config, *(_file_digest(path) for path in files))
    return digest(config, *_digests(loaded.network.state_dict()))


def _config_text(config: Any) -> str:
    """All that a config says but the folder that it was read from."""
    values = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    return json.dumps(values, sort_keys=True, default=str)


def _weight_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        return []
    return sorted(path for pattern in WEIGHTS for path in place.glob(pattern))


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    stride = max(BLOCK, size // PLACES)
    blocks = []
    with path.open("rb") as file:
        for place in range(0, size, stride):
            file.seek(place)
            blocks.append(file.read(BLOCK))
    return digest(path.name, str(size), *blocks)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and some numbers of every tensor."""
    return digest(*_digests(tensors))


def _digests(tensors: Mapping[str, Tensor]) -> list[str]:
    digests = []
    for name, weight in tensors.items():
        described = f"{name} {tuple(weight.shape)} {weight.dtype}"
        if weight.is_meta:
            digests.append(described)
            continue
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // PLACES)].cpu()
        numbers = some.double() if some.is_floating_point() else some
        digests.append(digest(described, numbers.contiguous().numpy().tobytes()))
    return digests

"""Reading the next decoder layer while the present one computes.

A thread has the system read the layer's stretches of files, to find them in its memory afterwards.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ghostlayers.model.tensor_files import header

READ_AHEAD_BYTES = 1 << 23
"""Read from a file at a time."""


class Stretch(NamedTuple):
    """The bytes of one tensor in a file."""

    path: Path
    start: int
    stop: int


class Ahead:
    """One decoder layer on its way."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def fetch(self, layer: nn.Module) -> None:
        """Begin to read a layer."""
        self._thread = threading.Thread(target=read, args=(stretches(layer),), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was begun is read."""
        if self._thread is not None:
            self._thread.join()


def stretches(layer: nn.Module) -> list[Stretch]:
    """Where on disk a layer's weights lie; nothing if they lie in memory."""
    places = []
    for module, hook in offloaded_modules(layer):
        index = getattr(getattr(hook.weights_map, "dataset", None), "index", {})
        prefix = getattr(hook.weights_map, "prefix", "")
        for name, _ in module.named_parameters(recurse=False):
            entry = index.get(f"{prefix}{name}", {})
            if "safetensors_file" in entry:
                path = Path(entry["safetensors_file"])
                tensor = header(path).get(entry["weight_name"])
                places += [Stretch(path, *tensor["data_offsets"])] if tensor else []
    return places


def read(places: Sequence[Stretch]) -> None:
    """Read stretches of files, and keep nothing of them here."""
    with contextlib.suppress(OSError):  # whoever needs them reports it
        for place in places:
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.start)
                for start in range(place.start, place.stop, READ_AHEAD_BYTES):
                    file.read(min(READ_AHEAD_BYTES, place.stop - start))


def offloading_hook(module: nn.Module) -> Any:
    """The hook that brings a module's own weights in for each call; None if they stay."""
    hook = getattr(module, "_hf_hook", None)
    offloads = getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None
    return hook if offloads and any(True for _ in module.parameters(recurse=False)) else None


def offloaded_modules(layer: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The modules of a layer whose own weights lie elsewhere, with their hooks."""
    for module in layer.modules():
        hook = offloading_hook(module)
        if hook is not None:
            yield module, hook

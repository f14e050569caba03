"""Fetching the next decoder layer while the present one computes.

A thread has the system read the layer's stretches of files. Where an accelerator computes, it then
copies the weights there too, on a stream of its own, so that disk, bus and arithmetic work at the
same time.
"""

import contextlib
import json
import threading
from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

READ_AHEAD_BYTES = 1 << 23
"""Read from a file at a time."""


class Ahead:
    """One decoder layer on its way.

    Without an accelerator it comes as far as the system's own cache of files.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._copies: dict[nn.Module, dict[str, Tensor]] = {}
        self._streams: dict[torch.device, Any] = {}

    def fetch(self, layer: nn.Module) -> None:
        """Begin to fetch a layer."""
        stream = self._stream_for(layer)
        self._thread = threading.Thread(target=self._fetch, args=(layer, stream), daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def in_place_of_files(self, layer: nn.Module) -> Iterator[None]:
        """Hand what was fetched to the hooks of a layer; they read the rest themselves."""
        copies, kept = self._take(), []
        for module, hook in offloaded_modules(layer):
            if module in copies:
                kept.append((hook, hook.weights_map))
                hook.weights_map = ChainMap(copies[module], hook.weights_map)
        try:
            yield
        finally:
            for hook, weights in kept:
                hook.weights_map = weights

    def wait_for_work(self) -> None:
        """Wait until weights that were copied ahead are used no more.

        Their memory goes back to the stream that copied them, which writes into it without
        waiting for the stream that computes.
        """
        for device in self._streams:
            streams_of(device).current_stream(device).synchronize()

    def drop(self) -> None:
        """Let go what was fetched."""
        self._take()

    def _take(self) -> dict[nn.Module, dict[str, Tensor]]:
        if self._thread is not None:
            self._thread.join()
        copies, self._copies = self._copies, {}
        return copies

    def _stream_for(self, layer: nn.Module) -> Any:
        """The stream that copies to where a layer computes; None if nothing is copied."""
        places = {torch.device(hook.execution_device) for _, hook in offloaded_modules(layer)}
        if len(places) != 1 or not (found := streams_of(device := places.pop())):
            return None
        if device not in self._streams:
            self._streams[device] = found.Stream(device)
        return self._streams[device]

    def _fetch(self, layer: nn.Module, stream: Any) -> None:
        read(stretches(layer))
        if stream is None:
            return
        # A layer that finds no room now is brought in the usual way, when the present one is gone;
        # whatever else is wrong is reported there.
        with contextlib.suppress(Exception), streams_of(stream.device).stream(stream):
            copies = {module: _copy(module, hook) for module, hook in offloaded_modules(layer)}
            stream.synchronize()
            self._copies = copies


def streams_of(device: torch.device) -> Any:
    """The module of torch that has a device's streams; None where copying ahead gains nothing."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "Stream") and hasattr(module, "stream") else None


def _copy(module: nn.Module, hook: Any) -> dict[str, Tensor]:
    """A module's own offloaded weights, where it computes.

    Tied ones are left to the hook, which knows them by where they lie in the processor's memory.
    """
    tied = hook.tied_params_map or {}
    copies = {}
    for name, _ in module.named_parameters(recurse=False):
        value = hook.weights_map[name]
        if name not in hook.tied_params_names and value.data_ptr() not in tied:
            copies[name] = value.to(hook.execution_device)
    return copies


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


@dataclass(frozen=True)
class _Place:
    """A stretch of a file."""

    path: str
    start: int
    stop: int


def stretches(layer: nn.Module) -> list[_Place]:
    """Where on disk a layer's weights lie; nothing if they lie in memory."""
    places = []
    for module, hook in offloaded_modules(layer):
        dataset = getattr(hook.weights_map, "dataset", None)
        prefix = getattr(hook.weights_map, "prefix", "")
        for name, _ in module.named_parameters(recurse=False):
            entry = getattr(dataset, "index", {}).get(f"{prefix}{name}", {})
            if "safetensors_file" in entry:
                places.append(_stretch(entry["safetensors_file"], entry["weight_name"]))
    return [place for place in places if place is not None]


_HEADERS: dict[str, dict[str, tuple[int, int]]] = {}


def _stretch(path: str, name: str) -> _Place | None:
    """The bytes of one tensor in a safetensors file."""
    if path not in _HEADERS:
        _HEADERS[path] = _offsets(path)
    found = _HEADERS[path].get(name)
    return None if found is None else _Place(path, *found)


def _offsets(path: str) -> dict[str, tuple[int, int]]:
    """Where each tensor lies: the file begins with the length of its JSON header."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    first = 8 + length
    return {
        name: (first + entry["data_offsets"][0], first + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read(places: Sequence[_Place]) -> None:
    """Have the system read stretches of files, to find them in its memory afterwards."""
    with contextlib.suppress(OSError):  # whoever needs them reports it
        for place in places:
            with Path(place.path).open("rb", buffering=0) as file:
                file.seek(place.start)
                left = place.stop - place.start
                while left > 0:
                    found = len(file.read(min(left, READ_AHEAD_BYTES)))
                    if not found:
                        break
                    left -= found

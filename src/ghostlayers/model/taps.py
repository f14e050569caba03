"""Catching what goes into a module of a decoder layer, or comes out of it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ghostlayers.errors import UnsupportedModelError


@dataclass
class Tap:
    """Catches what goes into a module, or comes out of it, while a layer runs.

    Attributes:
        output: catch what comes out.
        value: what was caught last.
    """

    output: bool = False
    value: Tensor | None = None

    def caught(self) -> Tensor:
        """The tensor, once.

        Raises:
            UnsupportedModelError: the module was not called.
        """
        if self.value is None:
            raise UnsupportedModelError(
                "a decoder layer never called one of its projections, so the repair cannot read "
                "what goes through it; take one that needs the stream only, such as ghost."
            )
        value, self.value = self.value, None
        return value


Taps = Iterable[tuple[str, Tap]]
"""Modules of a layer, by path, and what catches their inputs or outputs."""


def attach_taps(module: nn.Module, taps: Taps) -> list[Any]:
    """Attach taps to a module's children; the handles remove them."""
    handles = []
    for path, tap in taps:
        child = module.get_submodule(path)

        def before(_: nn.Module, args: tuple[Any, ...], tap: Tap = tap) -> None:
            tap.value = args[0]

        def after(_: nn.Module, args: Any, result: Any, tap: Tap = tap) -> None:
            del args
            tap.value = result[0] if isinstance(result, tuple) else result

        if tap.output:
            handles.append(child.register_forward_hook(after))
        else:
            handles.append(child.register_forward_pre_hook(before))
    return handles


@contextmanager
def tapped(module: nn.Module, taps: Taps) -> Iterator[None]:
    """Attach taps to a module's children for as long as the context lasts."""
    handles = attach_taps(module, taps)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

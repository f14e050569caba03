"""How packed weights lie in files, and what they stand for: a class a format.

A weight that is packed is several tensors in a file, whose names differ in their ends: the numbers
themselves, in few bits, and factors for groups of them. Everything here reads one weight at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ghostlayers.errors import ModelError, UnsupportedModelError
from ghostlayers.model.tensor_files import Held

WEIGHT = ".weight"

HeldParts = Mapping[str, Held]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout(ABC):
    """A format of packed weights, as a model's config describes it.

    Attributes:
        settings: the config's ``quantization_config``.
        library: what reading it needs beside torch and transformers.
        ends: how the names of the parts of a weight end, and how the weight's own name does. The
            weight's own name may be a part's, too: its end is the empty string.
        needs: parts that make up a packed weight; one of these sets is there, whole.
        turned: the weight is read as [out, in], also where a module keeps it as [in, out].
    """

    settings: Mapping[str, Any]
    library: ClassVar[str | None] = None
    ends: ClassVar[Mapping[str, str]]
    needs: ClassVar[tuple[frozenset[str], ...]]
    turned: ClassVar[bool] = False

    def part_of(self, name: str) -> tuple[str, str]:
        """Whose part a tensor is: the name of the weight, and the end of the tensor's own."""
        for end, own in self.ends.items():
            if name.endswith(end):
                return name.removesuffix(end) + own, end
        return name, ""

    def is_packed(self, parts: HeldParts) -> bool:
        """Whether these are the parts of a packed weight.

        Raises:
            ModelError: some of them are, and others are missing.
        """
        present = set(parts)
        if any(need <= present for need in self.needs):
            return True
        lacks = [need - present for need in self.needs if need & present - {""}]
        if lacks:
            missing, some = min(lacks, key=len), next(iter(parts.values()))
            raise ModelError(
                f"'{some.file}' holds '{some.name}', but what belongs to it is missing: expected "
                f"tensors that end in {' and '.join(sorted(missing)) or 'its own name'} beside it, "
                f"got {', '.join(sorted(e.name for e in parts.values()))}. Get the model again."
            )
        return False

    def check(self, weight: str, parts: HeldParts) -> None:  # noqa: B027 - few have to
        """Refuse parts that do not fit together, from the headers of their files alone.

        Args:
            weight: its name.
            parts: what the files hold of it, by the ends of their names.

        Raises:
            ModelError: with what was expected and what was got.
        """

    def bits(self, weight: str, parts: HeldParts) -> int:
        """Of a packed number."""
        del weight, parts
        return 8

    @abstractmethod
    def unpack(self, weight: str, parts: Parts) -> Tensor:
        """The numbers that the parts of a weight stand for.

        Args:
            weight: its name.
            parts: its tensors, by the ends of their names.

        Returns:
            The weight, in any floating-point type that its format allows.
        """


def check_shape(held: Held, wanted: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than config and neighbours make it.

    Raises:
        ModelError: with both shapes.
    """
    if tuple(held.shape) != wanted:
        raise ModelError(
            f"'{held.file}' holds '{held.name}' of shape {list(held.shape)}, but config.json's "
            f"bits and group_size and the tensors beside it make that {list(wanted)}. The groups "
            "of one format have one size; the file is damaged, or config.json is another model's. "
            "Get both again."
        )


def unknown_bits(weight: str, bits: int, known: str) -> UnsupportedModelError:
    """That a number of bits means nothing in a format."""
    return UnsupportedModelError(
        f"'{weight}' is packed in {bits} bits by config.json, but its format is known in {known}. "
        "Start from the checkpoint that was quantised."
    )


def other_form(method: str, entry: str, written: object, known: str) -> UnsupportedModelError:
    """That a format is written in a way that is not known here."""
    return UnsupportedModelError(
        f"the model's weights are quantised as '{method}' in a layout called '{written}' "
        f"('{entry}' in config.json), but known is {known}. Start from the checkpoint that was "
        "quantised, in bfloat16 or float16, and quantise the result."
    )

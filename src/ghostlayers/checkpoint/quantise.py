"""A GGUF file in other types: by llama.cpp's own quantiser, the simple ones by `gguf` as well.

The simple types are the same in both: a matrix whose rows are no multiple of 32 stays in 16 bits,
vectors, norms and routers stay as they are, and the head, or the embedding that stands in for it,
is given more bits than four and five. There llama.cpp takes Q6_K, which `gguf` cannot write, so it
is Q8_0 without llama.cpp. What the K and IQ types mix is llama.cpp's choice.
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType

from ghostlayers.errors import (
    DependencyError,
    ModelError,
    RecipeError,
    VerificationError,
    suggest,
)
from ghostlayers.evaluation import llama_cpp
from ghostlayers.model.gguf_file import header_entries, open_gguf
from ghostlayers.runtime.files import whole_file
from ghostlayers.runtime.locks import holding
from ghostlayers.runtime.shown import one_line

TYPES: Mapping[str, int] = {
    kind.name.partition("_")[2]: int(kind) for kind in gguf.LlamaFileType if kind.name != "GUESSED"
}
"""llama.cpp's types of files, by the names that llama-quantize has for them."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

PLAIN = ("F32", "F16", "BF16")
SIMPLE = (*PLAIN, "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What `gguf` can write: one type for all matrices."""

DEAF = (*PLAIN, "Q8_0")
"""Types that an importance matrix does not change."""

NEED_IMATRIX = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
)
"""Types some of whose tensors llama.cpp refuses to quantise without an importance matrix."""

PLACE = "{type}"
"""Where the type stands in the name of a family's files."""

_NEW_FIELDS = ("general.file_type", "general.quantization_version", "quantize.")
"""Entries that another type changes or adds, or how their names begin."""


@dataclass(frozen=True)
class Made:
    """A file that was made.

    Attributes:
        kind: its type.
        path: where it lies.
        tensors: how many tensors it has of each type.
    """

    kind: str
    path: Path
    tensors: Mapping[str, int]

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self.path.stat().st_size


def type_named(name: str) -> str:
    """A type of a file by the name that llama-quantize has for it, in any case.

    Raises:
        RecipeError: there is none; near ones are named.
    """
    known = ALIASES.get(name.upper(), name.upper())
    if known not in TYPES:
        raise RecipeError(f"unknown GGUF type '{one_line(name)}'. {suggest(known, TYPES)}")
    return known


def types_named(names: Iterable[str]) -> tuple[str, ...]:
    """Several of them, each once."""
    return tuple(dict.fromkeys(map(type_named, names)))


def family_paths(pattern: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """The file of each type: its name with the type in place of ``{type}``.

    Raises:
        RecipeError: there is no such place and several types, or a place and no type.
    """
    if PLACE not in pattern.name:
        if len(kinds) > 1:
            raise RecipeError(
                f"'{pattern}' names one file, but {len(kinds)} types are asked for "
                f"({', '.join(kinds)}): put {PLACE} into the name, as in small-{PLACE}.gguf."
            )
        return dict.fromkeys(kinds, pattern)
    if not kinds:
        raise RecipeError(
            f"'{pattern}' has a place for the type, but none is asked for: name some with --type, "
            "such as --type Q8_0,Q6_K,Q4_K_M."
        )
    return {kind: pattern.with_name(pattern.name.replace(PLACE, kind)) for kind in kinds}


def check_types(kinds: Sequence[str], *, imatrix: bool) -> None:
    """Refuse types that cannot be made here, before anything is.

    Args:
        kinds: names as `type_named` gives them.
        imatrix: an importance matrix will be there.

    Raises:
        RecipeError: a type needs an importance matrix, and there is none.
        DependencyError: llama.cpp is needed and not installed, or too old for what is asked.
    """
    lacking = [kind for kind in kinds if kind in NEED_IMATRIX]
    if lacking and not imatrix:
        raise RecipeError(
            f"{', '.join(lacking)} cannot be made without an importance matrix: llama.cpp refuses "
            "to. Add --imatrix-data with a text, such as --imatrix-data c4, or choose a type "
            "without one: Q4_K_M, IQ4_XS, Q3_K_M, Q2_K."
        )
    wanted = [kind for kind in kinds if _needs_engine(kind, imatrix=imatrix)]
    if not wanted:
        return
    how = " with an importance matrix" if imatrix else ""
    try:
        engine = llama_cpp.find_engine(f"making {', '.join(wanted)}{how}")
    except DependencyError as error:
        raise DependencyError(f"{error} {_without_engine(wanted, imatrix=imatrix)}") from error
    if imatrix and not engine.takes_imatrix:
        raise DependencyError(
            f"llama-cpp-python {engine.version} cannot hand an importance matrix to its quantiser; "
            f"take a newer one: {llama_cpp.INSTALL}. {_without_engine(wanted, imatrix=True)}"
        )


def _needs_engine(kind: str, *, imatrix: bool) -> bool:
    return kind not in SIMPLE or (imatrix and kind not in DEAF)


def _without_engine(kinds: Sequence[str], *, imatrix: bool) -> str:
    """What else can be done."""
    if imatrix:
        names = ("small-F16.gguf", "small-imatrix.gguf", f"small-{kinds[0]}.gguf", kinds[0])
        return (
            "Or write the 16-bit file and the importance matrix here (--type F16), and have "
            f"llama.cpp's own program make the others: {quantise_command(*names)}"
        )
    return f"Without it these can be made: {', '.join(SIMPLE)}."


def quantise_command(source: Path | str, imatrix: Path | str, out: Path | str, kind: str) -> str:
    """The command by which llama.cpp's own program makes a type with an importance matrix."""
    return shlex.join(["llama-quantize", "--imatrix", str(imatrix), str(source), str(out), kind])


def check_source(source: Path) -> None:
    """Refuse a GGUF file that is quantised already.

    Raises:
        ModelError: it is, or it cannot be read.
    """
    types = map(_type_of, open_gguf(source).tensors.values())
    packed = Counter(kind for kind in types if kind not in PLAIN)
    if packed:
        kind, count = packed.most_common(1)[0]
        raise ModelError(
            f"'{source}' is quantised already ({count} tensors are {kind}); quantised twice, its "
            "numbers would be rounded twice. Start from the checkpoint or from its 16-bit file."
        )


def quantise(
    source: Path,
    out: Path,
    kind: str,
    *,
    imatrix: Path | None = None,
    overwrite: bool = False,
) -> Made:
    """Write a GGUF file in another type, and check that it holds the same tensors.

    Args:
        source: a file of 16 or 32 bits.
        out: the file to make.
        kind: its type, a name in `TYPES`; see `check_types`.
        imatrix: an importance matrix, as `checkpoint.imatrix` writes it.
        overwrite: replace an existing file.

    Raises:
        ModelError: llama.cpp refuses, or a number is beyond the type.
        OutputError: the file exists or cannot be written.
        VerificationError: the file that was written lacks something.
    """
    alone = kind in SIMPLE and (imatrix is None or kind in DEAF)
    with holding(out, replace=overwrite), whole_file(out) as draft:
        if alone and (kind in PLAIN or not llama_cpp.is_installed()):
            _write(source, draft, kind)
        else:
            llama_cpp.run(
                "quantise", source=source, target=draft, type=TYPES[kind], imatrix=imatrix
            )
        tensors = _check(source, draft)
    return Made(kind, out, tensors)


def _check(source: Path, made: Path) -> dict[str, int]:
    """Refuse a file that says something else than the one it was made of; its types by number."""
    there, here = gguf.GGUFReader(source), gguf.GGUFReader(made)
    shapes = [{tensor.name: tuple(tensor.shape) for tensor in r.tensors} for r in (there, here)]
    if shapes[0] != shapes[1]:
        raise VerificationError("the quantised file lacks tensors, or has others; nothing is kept.")
    before, after = (dict(header_entries(reader)) for reader in (there, here))
    named = {name for name in before | after if not _is_new(name)}
    other = sorted(name for name in named if before.get(name) != after.get(name))
    if other:
        raise VerificationError(f"the quantised file says otherwise of {', '.join(other[:5])}.")
    return dict(Counter(map(_type_of, here.tensors)).most_common())


def _is_new(name: str) -> bool:
    return name.startswith(_NEW_FIELDS)


def _type_of(tensor: Any) -> str:
    return str(tensor.tensor_type.name)


def _write(source: Path, out: Path, kind: str) -> None:
    """By `gguf`, a tensor at a time."""
    reader = gguf.GGUFReader(source)
    names = {tensor.name for tensor in reader.tensors}
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    with closing(writer):
        _copy_fields(reader, writer)
        writer.add_file_type(TYPES[kind])
        if kind not in PLAIN:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        kinds = {tensor.name: _target(tensor, kind, head) for tensor in reader.tensors}
        for tensor in reader.tensors:
            shape, target = tuple(int(n) for n in tensor.shape[::-1]), kinds[tensor.name]
            block, size = gguf.GGML_QUANT_SIZES[target]
            num_bytes = int(np.prod(shape)) // block * size
            # For float32 the shape counts numbers, as wanted here; the raw type says what they are.
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), num_bytes, target)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(_encoded(tensor, kinds[tensor.name]))


def _copy_fields(reader: Any, writer: Any) -> None:
    for name, (value, kind, inner) in header_entries(reader):
        if not _is_new(name):
            writer.add_key_value(name, value, kind, inner)


def _target(tensor: Any, kind: str, head: str) -> TensorType:
    """The type that a tensor gets in a file of a simple type."""
    name, own = str(tensor.name), tensor.tensor_type
    fixed = "_norm.weight" in name or "ffn_gate_inp.weight" in name
    if len(tensor.shape) < 2 or fixed or not name.endswith("weight"):
        return TensorType(own)
    if kind not in PLAIN and int(tensor.shape[0]) % 32:
        return TensorType.F16
    return TensorType["Q8_0" if name == head and kind not in PLAIN else kind]


def _encoded(tensor: Any, target: TensorType) -> Any:
    """A tensor's numbers in another type.

    Raises:
        ModelError: they are beyond it.
    """
    if tensor.tensor_type == target:
        return tensor.data
    wide = gguf.dequantize(tensor.data, tensor.tensor_type)
    with np.errstate(over="ignore"):
        made = gguf.quantize(wide, target)
    if target == TensorType.F16 and not np.isfinite(made).all():
        raise ModelError(
            f"'{tensor.name}' holds {float(np.abs(wide).max()):.4g}, and float16 ends at 65504; "
            "choose BF16 or F32."
        )
    return made

"""A checkpoint as a family of GGUF files: one of 16 bits, proved, and from it each type."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ghostlayers.calibration.passes import Runner
from ghostlayers.calibration.squares import gather_squares
from ghostlayers.checkpoint.gguf_export import check_target, export_gguf
from ghostlayers.checkpoint.imatrix import named_for_llama_cpp, write_imatrix
from ghostlayers.checkpoint.quantise import (
    PLACE,
    PLAIN,
    Made,
    check_source,
    check_types,
    family_paths,
    quantise,
    quantise_command,
    types_named,
)
from ghostlayers.errors import RecipeError
from ghostlayers.model.gguf_families import check_facts
from ghostlayers.preparation import check_model, open_model, read_calibration
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.runtime import drafts, progress
from ghostlayers.runtime.locks import holding
from ghostlayers.runtime.places import check_apart
from ghostlayers.runtime.settings import documented, same_as, setting

_PANEL = "Importance matrix"


@documented
@dataclass(frozen=True)
class Family:
    """Which types of GGUF files are made of a checkpoint, and with what importance matrix."""

    types: tuple[str, ...] = setting(
        (),
        "Types of the files, as llama-quantize names them: Q8_0,Q6_K,Q5_K_M,Q4_K_M. Several need "
        "a place in the name of the file: --gguf small-{type}.gguf.",
        option="--type",
        metavar="NAMES",
        read="names",
    )
    imatrix_data: str | None = setting(
        None,
        "Text (c4, wikitext2, or files) on which the importance matrix of the checkpoint is "
        "measured, by which llama.cpp weighs its rounding errors. It is written beside the files.",
        _PANEL,
    )
    windows: int = same_as(Recipe, "windows", text="Windows of that text.", panel=_PANEL, least=1)
    sequence_length: int = setting(
        512, "Tokens a window; as many as llama-imatrix takes.", _PANEL, least=2
    )
    text_column: str | None = same_as(Recipe, "text_column", panel=_PANEL)
    separator: str = same_as(Recipe, "separator", panel=_PANEL)
    seed: int = same_as(Recipe, "seed", panel=_PANEL)

    def __post_init__(self) -> None:
        object.__setattr__(self, "types", types_named(self.types))
        if self.imatrix_data is not None and not self.types:
            raise RecipeError(
                "--imatrix-data is for files of several types, but none is asked for: name some "
                "with --type, such as --type Q4_K_M."
            )

    @property
    def recipe(self) -> Recipe:
        """How the text of the importance matrix is cut into windows."""
        return Recipe(
            data=self.imatrix_data, windows=self.windows, sequence_length=self.sequence_length,
            text_column=self.text_column, separator=self.separator, seed=self.seed,
            held_out_windows=0, select="streamline",
        )  # fmt: skip

    def paths(self, pattern: Path) -> dict[str, Path]:
        """The files that will be made by their types; `IMATRIX` among them, where there is one.

        Raises:
            RecipeError: as `quantise.family_paths` raises it.
        """
        paths = family_paths(pattern, self.types)
        if self.imatrix_data is not None:
            paths[IMATRIX] = _beside(pattern, IMATRIX)
        return paths

    def next_command(self, pattern: Path, kind: str = "Q4_K_M") -> str | None:
        """How llama.cpp's own program makes a further type with the same importance matrix.

        None without such a matrix, or where types are made that are quantised already.
        """
        paths = self.paths(pattern)
        if IMATRIX not in paths or not {*self.types} <= {*PLAIN}:
            return None
        plain = paths[self.types[0]]
        return quantise_command(plain, paths[IMATRIX], _beside(pattern, kind), kind)


IMATRIX = "imatrix"
"""In place of a type, of the file that holds the importance matrix."""


def _beside(pattern: Path, what: str) -> Path:
    """A further file of a family."""
    name = pattern.name.replace(PLACE, what)
    return pattern.with_name(name if PLACE in pattern.name else f"{pattern.stem}-{what}.gguf")


def export_family(
    source: str | Path,
    pattern: str | Path,
    family: Family,
    *,
    pre_tokenizer: str | None = None,
    dtype: str = "auto",
    options: RunOptions | None = None,
    overwrite: bool = False,
) -> Iterator[Made]:
    """Write a checkpoint as GGUF files of several types, each whole or not at all.

    Args:
        source: the folder of a stock checkpoint, or a GGUF file of 16 or 32 bits.
        pattern: the files to make; ``{type}`` in its name stands for the type.
        family: the types, and the text of an importance matrix.
        pre_tokenizer: see `export_gguf`.
        dtype: of the file that all others are made from; ``auto`` for the checkpoint's own.
        options: how the checkpoint is run for the importance matrix.
        overwrite: replace existing files.

    Yields:
        Every file as soon as it is there, the importance matrix first.

    Raises:
        GhostlayersError: what cannot be made is refused before anything is written.
    """
    source = Path(source)
    paths = family.paths(Path(pattern))
    check_apart({"checkpoint": [source]}, {f"{kind} file": path for kind, path in paths.items()})
    for path in paths.values():
        check_target(path, overwrite=overwrite)
    check_types(family.types, imatrix=family.imatrix_data is not None)
    with contextlib.ExitStack() as stack:
        for path in paths.values():
            stack.enter_context(holding(path, replace=overwrite))
        folder = drafts.new_folder(next(iter(paths.values())))
        stack.callback(drafts.remove, folder)
        base = _base(source, folder, pre_tokenizer, dtype, options)
        matrix = paths.pop(IMATRIX, None)
        if matrix is not None:
            _importance(source, matrix, family, options, overwrite=overwrite)
            yield Made(IMATRIX, matrix, {})
        with progress.stage(f"Writing {len(paths)} types", len(paths)) as advance:
            for kind, path in paths.items():
                yield quantise(base, path, kind, imatrix=matrix, overwrite=overwrite)
                advance(1)


def _base(
    source: Path,
    folder: Path,
    pre_tokenizer: str | None,
    dtype: str,
    options: RunOptions | None,
) -> Path:
    """The file that all others are made from."""
    if source.suffix == ".gguf" and source.is_file():
        check_source(source)
        return source
    return export_gguf(
        source,
        folder / "base.gguf",
        pre_tokenizer=pre_tokenizer,
        dtype=dtype,
        options=options,
    )


def _importance(
    source: Path,
    out: Path,
    family: Family,
    options: RunOptions | None,
    *,
    overwrite: bool,
) -> None:
    """Measure and write the importance matrix of a checkpoint as it is."""
    model = open_model(str(source), None, options or RunOptions())
    check_facts(model.config)
    check_model(model, family.recipe, surgery_follows=False)
    corpus, windows, _ = read_calibration(model, family.recipe, race_windows=0)
    squares = gather_squares(Runner(model), windows)
    rows = named_for_llama_cpp(model.network, squares.sums, squares.counts)
    write_imatrix(out, rows, text=corpus.name, windows=windows, overwrite=overwrite)

"""What `prune` leaves as a GGUF file: beside a checkpoint, or alone."""

from dataclasses import dataclass
from pathlib import Path

from ghostlayers.checkpoint.gguf_export import check_exportable, check_model, check_target
from ghostlayers.checkpoint.gguf_saving import How, check_named_cut
from ghostlayers.cli import saved_screen, screen
from ghostlayers.errors import RecipeError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import whole_of
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import Recipe, RunOptions, Save
from ghostlayers.runtime import drafts, parallel


@dataclass(frozen=True)
class GgufOutput:
    """The files that are asked for.

    Attributes:
        output: the folder, or the only file.
        beside: a file to be made of the folder's checkpoint.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text.
        how: the only file is written.
        overwrite: replace a file of that name.
    """

    output: Path
    beside: Path | None
    pre_tokenizer: str | None
    how: How
    overwrite: bool

    @property
    def only(self) -> bool:
        """Whether nothing but a file is left."""
        return self.output.suffix == ".gguf"

    @property
    def file(self) -> Path | None:
        """The file, if there is to be one."""
        return self.output if self.only else self.beside

    def check_asked(self, recipe: Recipe, save: Save) -> None:
        """Refuse what could not be made, before the model is opened.

        Raises:
            GhostlayersError: with the reason.
        """
        if self.only and self.beside is not None:
            raise RecipeError(
                f"-o {self.output} names a GGUF file already; drop --gguf, or name a folder."
            )
        if not self.only and self.how != How():
            raise RecipeError("--gguf-fallback and --gguf-split are for -o FILE.gguf.")
        if self.file is None and self.pre_tokenizer is not None:
            raise RecipeError(
                "--pre-tokenizer is for a GGUF file, but no --gguf FILE is asked for."
            )
        if self.file is not None:
            self.how.check()
            check_target(self.file, overwrite=self.overwrite)
            check_exportable(recipe, save)
            if self.only and recipe.export == "stock-layer":
                raise RecipeError(
                    "--export stock-layer needs a folder as the output, and --gguf for the file."
                )

    def check_base(self, dense: DenseModel, recipe: Recipe) -> None:
        """Refuse a model whose cut could not be written, as far as it shows before the cut.

        Raises:
            GhostlayersError: with the reason.
        """
        if self.file is None:
            return
        if self.only and dense.base.file is not None:
            check_named_cut(dense, recipe.removed())
            return
        if self.only and self.how.split is not None:
            raise RecipeError(
                "--gguf-split is for files that are copied from a GGUF file; split this one by "
                "llama.cpp's gguf-split."
            )
        check_model(whole_of(dense.network).config, dense.base.name, self.pre_tokenizer)

    def write(self, pruned: PrunedModel, options: RunOptions) -> None:
        """Write the file, if there is to be one, and say where it lies."""
        if self.file is None:
            return
        if not self.only:
            parallel.by_first(lambda: self._export(self.output, options))
        elif pruned.dense.base.file is None:
            parallel.by_first(lambda: self._through_folder(pruned, options))
        else:
            self._copy(pruned)

    def _copy(self, pruned: PrunedModel) -> None:
        screen.step(f"Writing {self.output} and reading it again ...")
        saved = pruned.save_gguf(
            self.output,
            fallback=self.how.fallback,
            split=self.how.split,
            overwrite=self.overwrite,
            progress=screen.Bars(),
        )
        saved_screen.show_copied(pruned, saved)

    def _through_folder(self, pruned: PrunedModel, options: RunOptions) -> None:
        folder = drafts.new_folder(self.output)
        try:
            pruned.save(folder / "checkpoint")
            self._export(folder / "checkpoint", options)
        finally:
            drafts.remove(folder)

    def _export(self, checkpoint: Path, options: RunOptions) -> None:
        from ghostlayers.cli.export import write_gguf

        assert self.file is not None
        write_gguf(checkpoint, self.file, self.pre_tokenizer, options, overwrite=self.overwrite)

"""What a run leaves, and what of that can be refused before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ghostlayers.checkpoint.gguf_cuts import GgufCuts
from ghostlayers.checkpoint.gguf_export import check_exportable, check_model, check_target
from ghostlayers.checkpoint.gguf_saving import How
from ghostlayers.errors import RecipeError, UnsupportedModelError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import whole_of
from ghostlayers.recipe import Recipe, Save
from ghostlayers.spans import Span, format_layers, merge_layers, removed_layers


@dataclass(frozen=True)
class Output:
    """What a run leaves.

    Attributes:
        save: a whole checkpoint, or what distinguishes it from its base.
        gguf: a GGUF file to be made of the checkpoint, too.
        folder: where; beside the files for a while if not given. A name that ends in ``.gguf`` is
            that of one file.
        how: that one file is written.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text, where it is not known.
        overwrite: replace files of those names.
    """

    save: Save = "checkpoint"
    gguf: Path | None = None
    folder: Path | None = None
    how: How = field(default_factory=How)
    pre_tokenizer: str | None = None
    overwrite: bool = False

    @property
    def is_file(self) -> bool:
        """Whether nothing but a GGUF file is left."""
        return self.folder is not None and self.folder.suffix == ".gguf"

    @property
    def file(self) -> Path | None:
        """The GGUF file, if there is to be one."""
        return self.folder if self.is_file else self.gguf

    def copies(self, dense: DenseModel) -> bool:
        """Whether a GGUF file is copied from the model's own."""
        return self.is_file and dense.base.file is not None

    def check_asked(self, recipe: Recipe) -> None:
        """Refuse what could not be made, before the model is opened.

        Raises:
            GhostlayersError: with the reason.
        """
        if self.is_file and self.gguf is not None:
            raise RecipeError(
                f"-o {self.folder} names a GGUF file already; drop --gguf, or name a folder."
            )
        if not self.is_file and self.how != How():
            raise RecipeError("--gguf-fallback and --gguf-split are for -o FILE.gguf.")
        if self.file is None:
            if self.pre_tokenizer is not None:
                raise RecipeError(
                    "--pre-tokenizer is for a GGUF file, but no --gguf FILE is asked for."
                )
            return
        self.how.check()
        check_target(self.file, overwrite=self.overwrite)
        check_exportable(recipe, self.save)
        if self.is_file and recipe.export == "stock-layer":
            raise RecipeError(
                "--export stock-layer needs a folder as the output, and --gguf for the file."
            )

    def check_base(self, dense: DenseModel, recipe: Recipe) -> None:
        """Refuse a model no cut of which, as asked for, could be written.

        Raises:
            GhostlayersError: with the reason.
        """
        if not self._is_for_llama_cpp(recipe):
            return
        if self.copies(dense):
            assert dense.base.file is not None
            assert self.file is not None
            self.how.check_copied(dense.base.file, self.file)
        elif self.file is not None:
            self.how.check_made_anew()
            check_model(whole_of(dense.network), dense.tokenizer, self.pre_tokenizer)
        if recipe.export == "stock-layer":  # the config that is written is another family's
            return
        removed = recipe.removed()
        if removed is None:
            GgufCuts(dense, self.copies(dense)).check_choice(recipe)
        else:
            GgufCuts(dense, self.copies(dense)).check(merge_layers(removed))

    def _is_for_llama_cpp(self, recipe: Recipe) -> bool:
        return self.file is not None or recipe.engine == "llama.cpp"

    def check_cut(self, dense: DenseModel, recipe: Recipe, spans: Sequence[Span]) -> None:
        """Refuse layers that have been chosen and whose cut no GGUF file could hold.

        Raises:
            UnsupportedModelError: with the reason.
        """
        if not self._is_for_llama_cpp(recipe) or recipe.export == "stock-layer":
            return
        try:
            GgufCuts(dense, self.copies(dense)).check(spans)
        except UnsupportedModelError as error:
            layers = format_layers(removed_layers(spans))
            raise UnsupportedModelError(
                f"{error} Chosen were layers {layers}; take --select streamline, by which one run "
                "goes, or name the layers with --remove."
            ) from error

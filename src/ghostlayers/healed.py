"""The result of training after a cut: a healed model, and the evidence for it."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlayers import modeling
from ghostlayers.calibration import journal
from ghostlayers.calibration.fingerprint import model_fingerprint, tensors_digest
from ghostlayers.checkpoint import adapter, proof, saving
from ghostlayers.errors import NoGainError, RecipeError, ResumeError, VerificationError
from ghostlayers.healing.adapters import lora_config
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.healing.outcome import Outcome
from ghostlayers.healing.record import healing_row, with_healing
from ghostlayers.healing.text import read_text
from ghostlayers.healing.training import KEY, Training
from ghostlayers.model import multimodal
from ghostlayers.model.causal import check_causal
from ghostlayers.model.residency import keep, read_tensor
from ghostlayers.preparation import Documents
from ghostlayers.recipe import RunOptions
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.repairs.base import Operator, Repair
from ghostlayers.runtime.machine import versions
from ghostlayers.runtime.parallel import check_same, shards, world
from ghostlayers.runtime.quiet import quiet_imports
from ghostlayers.spans import Span, kept_layers, pruned_boundary
from ghostlayers.surgery.removal import share_weights
from ghostlayers.text.tokens import check_sequence_length

Save = Literal["checkpoint", "adapter", "peft"]

PEFT_FILE = "adapter_model.safetensors"
"""What PEFT calls the weights of an adapter."""

MERGED_ALIKE = 0.02
"""Of the greatest change by an adapter, what types of 16 bits may take of it, rounding beside."""


@dataclass(frozen=True)
class HealedModel:
    """A healed model, and the evidence for it.

    Attributes:
        model: an ordinary transformers model, whole where it sees images, too; where it was not
            trained, its weights are the dense one's. Of a run that shards its models (FSDP2) the
            first process alone holds it; in the others it is the cut model as it was.
        cut: the model as it was before.
        recipe: what was asked for.
        outcome: how training went.
        record: provenance, as it is written into the checkpoint.
        kept_in: the folder of what the run keeps until the result is saved; see
            `heal_pipeline.heal`.
    """

    model: PreTrainedModel
    cut: CutModel
    recipe: HealingRecipe
    outcome: Outcome
    record: dict[str, Any]
    kept_in: Path | None = None

    def __repr__(self) -> str:
        start, end = self.outcome.start.kl_nats, self.outcome.end.kl_nats
        return f"HealedModel({self.cut.dense.base.name!r}, KL {start:.4f} before, {end:.4f} after)"

    @property
    def better(self) -> bool:
        """Whether it is better than before on held-out windows."""
        return self.outcome.better

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The dense model's tokenizer."""
        return self.cut.dense.tokenizer

    def check_better(self) -> None:
        """Refuse a model that training did not make better, and forget what a whole run kept.

        Raises:
            NoGainError: it did not.
        """
        if self.better:
            return
        if self.kept_in is not None and self.outcome.complete:
            journal.finish(self.kept_in)  # another try is another request
        further = "" if self.outcome.complete else " Leave --keep away to train on."
        before, after = self.outcome.start, self.outcome.looks[-1].losses
        raise NoGainError(
            f"training gained nothing on '{self.outcome.text.held_out_name}': loss "
            f"{before.loss_nats:.4f} and KL to dense {before.kl_nats:.4f} before, "
            f"{after.loss_nats:.4f} and {after.kl_nats:.4f} after. Nothing was written. Take more "
            "tokens, a lower --learning-rate, or training text nearer to what is held out; "
            f"--keep-worse writes it all the same.{further}"
        )

    def save(self, out: str | Path, *, overwrite: bool = False) -> proof.Verification:
        """Write a checkpoint, and prove in a fresh process that it reloads.

        Raises:
            OutputError: the folder exists, or cannot be written.
            VerificationError: the reloaded model differs; nothing is left behind.
        """
        network, record = self.outcome.network, self.record
        return self._once(
            out, lambda: save_whole(self.cut, network, record, Path(out), overwrite=overwrite)
        )

    def save_adapter(self, out: str | Path, *, overwrite: bool = False) -> proof.Verification:
        """Write only what distinguishes the model from its dense one; see `PrunedModel`.

        Raises:
            OutputError: the folder exists, or cannot be written.
            VerificationError: the rebuilt model differs; nothing is left behind.
        """
        check_save("adapter", self.outcome.parts, "stock-layer" if self.cut.made_layers() else "")
        repairs, weights = self._difference()
        return self._once(
            out,
            lambda: adapter.save_adapter(
                Path(out),
                self.cut.dense,
                self.outcome.network,
                repairs,
                self.record,
                weights=weights,
                overwrite=overwrite,
            ),
        )

    def save_peft(self, out: str | Path, *, overwrite: bool = False) -> proof.Verification:
        """Write the adapters of ``lora`` for the cut model's checkpoint, as PEFT does.

        Raises:
            RecipeError: see `check_save`.
            OutputError: the folder exists, or cannot be written.
            VerificationError: what PEFT makes of them differs; nothing is left behind.
        """
        check_save("peft", self.outcome.parts, "adapter" if self.cut.folder is None else "")
        tensors = {n: tensor.cpu().contiguous() for n, tensor in self.outcome.adapters.items()}
        record = {**self.record, "mode": "peft", "adapter_of": str(self.cut.folder)}
        return self._once(
            out,
            lambda: saving.save_tensors(
                Path(out), PEFT_FILE, tensors, record, self._prove_peft, overwrite=overwrite
            ),
        )

    def _prove_peft(self, folder: Path) -> proof.Verification:
        """Describe the adapters as PEFT does, and load them with it onto the cut model."""
        with quiet_imports():
            from peft import PeftModel

        adapted = list(map(multimodal.name_in_whole, self.outcome.adapted))
        config = lora_config(self.recipe, adapted)
        config.base_model_name_or_path = str(self.cut.folder)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        base = multimodal.whole_of(share_weights(self.cut.network))
        base.hf_device_map = None  # or PEFT writes the offloaded files anew, wherever it stands
        for path in adapted:  # PEFT puts adapters where the weights are
            keep(base.get_submodule(path))
        with warnings.catch_warnings():  # of names that transformers will drop
            warnings.simplefilter("ignore", FutureWarning)
            made = PeftModel.from_pretrained(base, str(folder)).eval()
        whole: Any = made.base_model.model
        network = multimodal.text_view(whole)
        if self.cut.dense.stored_dtype == torch.float32:
            return proof.compare_logits(network, self.outcome.network)
        # Merged weights are rounded, which moves logits as far as a short training does.
        self._check_merged(whole)
        return proof.compare_logits(network, self.outcome.network, math.inf)

    @torch.no_grad()
    def _check_merged(self, whole: Any) -> None:
        """Whether PEFT's adapters, merged and rounded, are the trained projections.

        Raises:
            VerificationError: a projection is another.
        """
        trained = multimodal.whole_of(self.outcome.network)
        rounding = torch.finfo(self.cut.dense.stored_dtype).eps
        for path in map(multimodal.name_in_whole, self.outcome.adapted):
            module = whole.get_submodule(path)
            own, change = read_tensor(trained, f"{path}.weight"), module.get_delta_weight("default")
            base = read_tensor(module.base_layer, "weight").float()
            want = base + change.float().to(base.device)
            off = (own.float().to(want.device) - want).abs()
            allowed = rounding * want.abs() + MERGED_ALIKE * change.abs().max()
            if not bool((off <= allowed).all()):
                raise VerificationError(
                    f"what PEFT makes of the adapters of {path} differs from the trained weight by "
                    f"up to {float(off.max()):.3g}; nothing was kept. Please report this with the "
                    "model's name, or take --save checkpoint."
                )

    def _difference(self) -> tuple[dict[Span, Repair], adapter.Weights]:
        """Operators by gap, and weights that are not the dense model's, by its own names."""
        network = self.outcome.network
        cut = CutModel.of(self.cut.dense, network, self.cut.spans, self.record)
        kept = kept_layers(cut.spans, cut.dense.num_layers)
        boundaries = {pruned_boundary(span, cut.spans): span for span in cut.spans}
        operators: dict[Span, dict[str, Any]] = {span: {} for span in cut.spans}
        weights: adapter.Weights = {}
        for name in sorted(cut.own):
            layer, leaf = cut.layer_of(name), name.rpartition(".")[2]
            value = network.get_parameter(name).detach()
            if layer is None:
                weights.setdefault(None, {})[name] = value
            elif leaf.startswith("repair_"):
                place, term = leaf.removeprefix("repair_").split("_", 1)
                span = boundaries[layer + 1 if place == "after" else layer]
                operators[span][term] = value
            else:
                end = name.removeprefix(f"{cut.layers_path}.{layer}.")
                weights.setdefault(kept[layer], {})[end] = value
        method = self.record["recipe"]["repair"]
        eps = modeling.norm_eps(network.config)
        repairs = {
            span: Repair(method, Operator(own, eps=eps) if own else None)
            for span, own in operators.items()
        }
        return repairs, weights

    def _once(self, out: str | Path, write: Callable[[], proof.Verification]) -> proof.Verification:
        read = [self.cut.dense.base.name, *(name for name, _ in self.recipe.mix)]
        return journal.write_once(write, out, read, self.kept_in)


def check_save(save: Save, parts: Sequence[str] | None, mode: str) -> None:
    """Refuse a form that a healed model has no place in.

    Args:
        save: what is to be written.
        parts: what is trained; None if that is not known yet.
        mode: of the cut model's record; ``adapter`` where it lies in no folder of its own.

    Raises:
        RecipeError: there is no such form of it.
    """
    if save == "peft" and tuple(parts or ()) != ("lora",):
        trained = "" if parts is None else f"; trained is {' + '.join(parts)}"
        raise RecipeError(
            f"--save peft keeps the adapters of --train lora apart, and nothing else{trained}. "
            "Take --train lora, or --save checkpoint."
        )
    if save == "peft" and mode == "adapter":
        raise RecipeError(
            "--save peft writes adapters for the checkpoint of the cut model, but that lies in no "
            "folder. Save the cut model first (of an adapter: `ghostlayers materialize`), and heal "
            "that folder."
        )
    if save == "adapter" and shards() > 1:
        raise RecipeError(
            "--save adapter compares the whole model with the dense one, which FSDP has divided "
            "among the processes. Take --save checkpoint, or start without --use_fsdp."
        )
    if save == "adapter" and mode == "stock-layer":
        raise RecipeError(
            "--save adapter knows its model by the layers of the dense one, but this one's repair "
            "is a layer of its own. Take --save checkpoint."
        )


def save_whole(
    cut: CutModel, model: PreTrainedModel, record: dict[str, Any], out: Path, *, overwrite: bool
) -> proof.Verification:
    """Write a checkpoint with what the dense model has beside its weights, and prove it.

    Raises:
        OutputError: the folder exists, or cannot be written.
        VerificationError: the reloaded model differs; nothing is left behind.
    """
    dense = cut.dense
    return saving.save_checkpoint(
        out,
        model,
        dense.tokenizer,
        record,
        stored_dtype=dense.stored_dtype,
        base_folder=dense.base.folder,
        processor=dense.processor,
        overwrite=overwrite,
    )


def heal_cut(
    cut: CutModel,
    recipe: HealingRecipe,
    options: RunOptions,
    *,
    data: Documents | None = None,
    keep: Path | None = None,
    take_kept: bool = False,
) -> HealedModel:
    """Train a cut model; see `heal_pipeline.heal`.

    Raises:
        GhostlayersError: bad input, or a loss that is no number.
    """
    dense = cut.dense
    check_sequence_length(dense.config, recipe.sequence_length)
    check_causal(dense)
    if recipe.writes and world().size > 1:
        raise RecipeError(
            "@dense is written by one process, and a launcher has started several: write the text "
            "with `ghostlayers write-data DENSE --prefixes CORPUS -o FILE`, and name that file."
        )

    def train(passes: journal.Journal | None) -> Outcome:
        return Training(
            cut,
            recipe,
            lambda count, recipe: read_text(dense, recipe, count, data, keep),
            options.batch_size,
            passes,
            train=not take_kept,
        ).run()

    request = _request(cut, recipe, options)
    check_same("request", request)
    if keep is None:
        outcome = train(None)
    else:
        with journal.keeping(keep, request) as passes:
            if take_kept and not any(keep.glob(f"{KEY}-*.safetensors")):
                raise ResumeError(
                    f"nothing is kept in '{keep}' yet: a run keeps its state every half minute. "
                    "Leave --keep away to train."
                )
            outcome = train(passes)
    record = with_healing(cut.record, healing_row(recipe, outcome))
    whole = multimodal.whole_of(outcome.network)
    return HealedModel(whole, cut, recipe, outcome, record, keep)


def _request(cut: CutModel, recipe: HealingRecipe, options: RunOptions) -> dict[str, Any]:
    """All that the state of a run depends on, beside its text."""
    own = {name: cut.network.get_parameter(name) for name in sorted(cut.own)}
    return {
        "healing": recipe.to_dict(),
        "model": model_fingerprint(cut.dense),
        "cut": [[span.start, span.stop] for span in cut.spans],
        "weights": tensors_digest(own),
        "dtype": str(cut.dense.network.dtype),
        "device": cut.dense.device.type,
        "batch_size": options.batch_size,
        "processes": world().size,
        "versions": versions(),
        **({"shards": shards()} if shards() > 1 else {}),
    }

"""`Study`: one dense model and one text, opened once; everything else is a verb on it."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostlayers.budgets.budgets import beyond_budget, budget_of, check_what_follows
from ghostlayers.budgets.decide import Budget, check_wished, choose_within, settled
from ghostlayers.budgets.instead import type_instead, weighed
from ghostlayers.budgets.loss import search_loss
from ghostlayers.budgets.planned import plan_run
from ghostlayers.calibration import journal, scoring, search
from ghostlayers.calibration.contest import hold_contest
from ghostlayers.calibration.cuts import measure_cuts, measure_evidence, unrepaired
from ghostlayers.calibration.fingerprint import run_request
from ghostlayers.calibration.fits import make_fitting
from ghostlayers.calibration.fitting import fit_many
from ghostlayers.calibration.measuring import Repairs, candidates, measure
from ghostlayers.calibration.passes import Runner
from ghostlayers.calibration.search import ChosenCut
from ghostlayers.checkpoint.output import Output
from ghostlayers.checkpoint.record import make_record
from ghostlayers.errors import RecipeError
from ghostlayers.healed import HealedModel, heal_cut
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.model import multimodal
from ghostlayers.model.causal import check_causal
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import text_view
from ghostlayers.plan.expected import seconds_since_start
from ghostlayers.plan.saving import CHECKPOINT
from ghostlayers.plan.units import Plan
from ghostlayers.preparation import (
    Documents,
    ModelSource,
    Tokenizer,
    check_asked,
    check_model,
    check_request,
    check_result,
    make_recipe,
    open_model,
    read_calibration,
    read_evaluation,
)
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import HealingRecipe, Recipe, RunOptions
from ghostlayers.recipe.wish import DETAILS, HOW_MANY
from ghostlayers.repairs import REPAIR_REGISTRY, RepairMethod
from ghostlayers.runtime.machine import versions
from ghostlayers.runtime.parallel import check_same, from_first, world
from ghostlayers.selection import ScoreTable, Selection
from ghostlayers.spans import Span
from ghostlayers.statistics.losses import LossSums
from ghostlayers.surgery import removal
from ghostlayers.surgery.stock_layer import as_stock_layers
from ghostlayers.text.corpora import BLANK_LINE, Corpus
from ghostlayers.text.tokens import Windows


@dataclass(frozen=True, repr=False)
class Study:
    """One dense model and one text; nothing in it changes.

    >>> study = Study.open("HuggingFaceTB/SmolLM2-135M", data="c4", windows=128)  # doctest: +SKIP
    >>> cut = study.choose("recoverable", layers=7)  # doctest: +SKIP
    >>> repairs = study.fit(cut, ["ghost", "joint:x+z:ridge=auto"])  # doctest: +SKIP
    >>> losses = study.losses(cut, repairs, on="wikitext2")  # doctest: +SKIP
    >>> study.build(cut, repairs["ghost"]).save("smaller")  # doctest: +SKIP

    Attributes:
        runner: runs the model over windows.
        recipe: what its verbs do unless they are told otherwise.
        options: how the model was opened and runs.
        corpus: the calibration text.
        windows: of it, for scores, searches and fits.
        held_out: further ones, which nothing is fitted on.
        started: seconds that this process took until the model was open.
        output: what is to be made of a result.
        budget: that the recipe's number of layers was settled by; see `settled`.
        kept_in: where a run keeps what it has done; see `keeping`.
    """

    runner: Runner
    recipe: Recipe
    options: RunOptions
    corpus: Corpus
    windows: Windows
    held_out: Windows
    started: float = 0.0
    output: Output = CHECKPOINT
    budget: Budget | None = None
    kept_in: Path | None = None

    @classmethod
    def open(
        cls,
        model: ModelSource,
        recipe: Recipe | None = None,
        *,
        tokenizer: "Tokenizer | None" = None,
        data: Documents | None = None,
        options: RunOptions | None = None,
        revision: str | None = None,
        surgery_follows: bool = True,
        result_follows: bool = False,
        output: Output | None = None,
        **choices: Any,
    ) -> "Study":
        """Open a model and read its calibration text.

        Args:
            model: a folder, a hub id, a ``.gguf`` file, or a causal language model in memory.
            recipe: what to do; its fields can also be given by name, such as ``windows=128``.
            tokenizer: for a model in memory.
            data: calibration text instead of the recipe's: documents, or a name or path.
            options: how to run.
            revision: of a model on the hub.
            surgery_follows: layers will be removed, so the family must be one that can be cut.
            result_follows: the recipe will be carried out and its result saved, so that it must say
                what goes, and the model must have a place for its repair.
            output: what that result will be, where more than a checkpoint is to be made of it.
            choices: fields of the recipe.

        Raises:
            GhostlayersError: bad input; what cannot work is refused before any text is read.
        """
        recipe = make_recipe(recipe, choices)
        options = dataclasses.replace(options or RunOptions(), preset=recipe.preset)
        how = {"surgery_follows": surgery_follows, "exact": output is not None and output.is_file}
        dense = open_model(model, tokenizer, options, revision, **how)
        started = seconds_since_start()
        if result_follows:
            check_what_follows(dense, recipe, output)
        else:
            check_model(dense, recipe, surgery_follows=surgery_follows)
        text = read_calibration(dense, recipe, data)
        check_causal(dense)
        runner = Runner(dense, options.batch_size, sweeps={})
        return cls(runner, recipe, options, *text, started, output or CHECKPOINT)

    def __repr__(self) -> str:
        model, text, windows = self.dense.base.name, self.corpus.name, self.windows
        counts = (
            f"{len(windows)} + {len(self.held_out)} windows of {windows.sequence_length} tokens"
        )
        return f"Study({model!r}, {counts} of {text!r})"

    @property
    def dense(self) -> DenseModel:
        """The dense model."""
        return self.runner.model

    def with_choices(self, **choices: Any) -> "Study":
        """The same with other choices: fields of the recipe that do not change the text.

        Raises:
            GhostlayersError: what cannot work with this model.
        """
        given = {name: value for name, value in choices.items() if value is not None}
        base, budget = self.recipe, self.budget
        if given and budget is not None:  # the number of layers is settled anew
            base, budget = budget.recipe, None
        if set(given) & set(HOW_MANY):  # one of them: the others' is no longer asked
            given = {**dict.fromkeys((*HOW_MANY, *DETAILS)), **given}
        recipe = make_recipe(base, given)
        study = dataclasses.replace(self, recipe=recipe, budget=budget)
        check_asked(recipe)
        if recipe.wish is None:
            check_request(self.dense, recipe, surgery_follows=False)
        else:
            check_wished(self.dense, recipe, self.output, surgery_follows=False)
        return study

    def settled(self) -> "Study":
        """The same, in whose recipe a budget of bytes or speed has become a number of layers.

        Speed is measured for it, once in a run. A budget of loss is settled by `choose`.

        Raises:
            GhostlayersError: the budget is out of reach, or met already.
        """
        wish = self.recipe.wish
        if wish is None or wish.kind == "max_loss":
            return self
        budget = budget_of(self.runner, self.recipe, self.output)
        recipe = settled(self.recipe, from_first(budget.fewest()))
        return dataclasses.replace(self, recipe=recipe, budget=budget)

    def scores(self, **choices: Any) -> ScoreTable:
        """Score every layer, and every contiguous span of ``layers`` layers.

        What only some selections need is measured when ``select`` says so: losses after repair of
        the shortlist of ``recoverable``, or the importance of every layer.
        """
        study = self.with_choices(**choices).settled()
        if study.recipe.layers is None and study.recipe.remove is None:
            raise RecipeError(
                "--max-loss chooses and repairs for every number of layers that it tries; to look "
                "at scores, say how many (--layers)."
            )
        return measure(study, candidates(study), residuals=True)[0]

    def choose(self, select: str | Selection | None = None, **choices: Any) -> ChosenCut:
        """The layers to remove, by a selection, or as named (``remove="20-22"``).

        With a budget (``smaller="20%"``, ``faster="1.25x"``, ``fits="6GiB"``, ``max_loss=0.1``),
        their number follows from it; the cut then says how.
        """
        study = self.with_choices(select=select, **choices).settled()
        if study.recipe.max_loss is not None:
            chosen = search_loss(study, study.output)
        elif study.budget is not None:
            assert study.recipe.layers is not None
            chosen = choose_within(
                study.budget,
                study.recipe.layers,
                lambda recipe: search.choose(dataclasses.replace(study, recipe=recipe)),
            )
            chosen = chosen.with_instead(type_instead(study.budget))
        else:
            chosen = search.choose(study)
        check_same("choice of layers", chosen.spans)
        return chosen

    def choose_repair(self, cut: ChosenCut) -> ChosenCut:
        """The same cut with the repair that held-out windows choose, fitted.

        As it is, unless the recipe leaves the repair to them (``auto``).
        """
        if not cut.recipe.contested:
            return cut
        study = dataclasses.replace(self, recipe=cut.recipe)
        barred = beyond_budget(self.runner, self.budget, cut.spans)
        contest, repairs = hold_contest(study, cut.spans, barred=barred)
        check_same("choice of a repair", contest.winner)
        recipe = cut.recipe.repaired_by(contest.winner)
        return dataclasses.replace(cut, recipe=recipe, repairs=repairs, contest=contest)

    def fit(self, cut: ChosenCut, repairs: Sequence[str | RepairMethod] = ()) -> dict[str, Repairs]:
        """Fit repairs of one cut from one sweep.

        Args:
            cut: the layers that go.
            repairs: names such as ``ghost:rank=64``, or objects; the recipe's own if none is given,
                of ``auto`` the one that `choose_repair` takes.

        Returns:
            A repair for every gap, by name.
        """
        text_of = REPAIR_REGISTRY.text_of  # it brings an object of a script's class along
        cut = cut if repairs else self.choose_repair(cut)
        if cut.repairs is not None and not repairs:  # settled while layers were chosen
            return {text_of(cut.recipe.repair): cut.repairs}
        fittings = {
            text_of(repair): make_fitting(self.dense, cut.recipe, repair)
            for repair in repairs or [cut.recipe.repair]
        }
        windows = self.windows.first(cut.recipe.num_fit_windows)
        return fit_many(self.runner, windows, cut.spans, fittings)

    def losses(
        self,
        cut: ChosenCut,
        repairs: Mapping[str, Mapping[Span, Any]] | None = None,
        *,
        on: Documents | Windows | None = None,
        max_windows: int | None = None,
    ) -> dict[str, LossSums]:
        """Losses of the dense, the cut and every repaired model; no model is built.

        Args:
            cut: the layers that go.
            repairs: as `fit` returns them.
            on: text to measure on, or windows of one; the held-out windows of the calibration text
                if not given.
            max_windows: the first so many windows of that text.
        """
        if on is None:
            windows = self.held_out.first(cut.recipe.num_held_out_windows)
        else:
            windows = on if isinstance(on, Windows) else self._read(on, max_windows)
        return measure_cuts(self.runner, windows, {"cut": unrepaired(cut.spans), **(repairs or {})})

    def build(self, cut: ChosenCut, repairs: Repairs | None = None) -> PrunedModel:
        """The cut model with its repairs, and the evidence for it; nothing is written.

        Args:
            cut: the layers that go.
            repairs: one a gap, as `fit` returns them by name; none leaves the bare cut.
        """
        repairs = repairs or unrepaired(cut.spans)
        method = next(iter(repairs.values())).method
        if cut.recipe.contested or method != cut.recipe.method.name:
            cut = dataclasses.replace(cut, recipe=cut.recipe.repaired_by(method))
            check_result(self.dense, cut.recipe)
        return _build(self, cut, repairs)

    def heal(
        self, pruned: PrunedModel, recipe: HealingRecipe | None = None, **choices: Any
    ) -> HealedModel:
        """Train what `build` made for minutes, on the study's text unless another is named.

        Args:
            pruned: of this study.
            recipe: what is trained, and how long.
            choices: fields of that recipe, by name.
        """
        recipe = (recipe or HealingRecipe()).changed(choices)
        data = self.corpus if recipe.data is None else None
        cut = CutModel.of(self.dense, text_view(pruned.model), pruned.spans, pruned.record)
        return heal_cut(cut, recipe, self.options, data=data)

    def plan(self, output: Output | None = CHECKPOINT) -> Plan:
        """What the recipe will take on this machine: the same passes, priced instead of run."""
        how = (self.options, self.started, output, self.budget)
        return plan_run(self.dense, self.recipe, *how)

    @contextlib.contextmanager
    def keeping(self, folder: str | Path | None) -> "Iterator[Study]":
        """The same study, which keeps its passes in a folder: the same calls go on from there.

        Several processes are checked to run the same.
        """
        if folder is None and world().size == 1:  # nobody asks what the run is
            yield self
            return
        text = self.windows.joined_with(self.held_out)
        request = run_request(self.dense, self.recipe, text, self.options)
        check_same("request", request)
        if folder is None:
            yield self
            return
        with journal.keeping(Path(folder), request) as passes:
            runner = dataclasses.replace(self.runner, journal=passes)
            yield dataclasses.replace(self, runner=runner, kept_in=Path(folder))

    def _read(self, source: Documents, max_windows: int | None) -> Windows:
        recipe = self.recipe
        _, windows = read_evaluation(
            source,
            self.dense.tokenizer,
            separator=BLANK_LINE,
            text_column=recipe.text_column,
            sequence_length=recipe.sequence_length,
            max_windows=max_windows,
            bos=recipe.bos,
        )
        return windows


def _build(study: Study, cut: ChosenCut, repairs: Repairs) -> PrunedModel:
    dense, recipe = study.dense, cut.recipe
    held_out = study.held_out.first(recipe.num_held_out_windows)
    evidence = measure_evidence(study.runner, held_out, repairs)
    decision = weighed(study.runner, cut.decision, held_out, evidence)
    births = scoring.find_births(study.runner, study.windows, cut.spans, cut.table)
    pruned = removal.prune_layers(dense, cut.spans, repairs)
    if recipe.export == "stock-layer":
        pruned = as_stock_layers(dense, pruned, cut.spans, repairs)
    record = make_record(
        base=dense.base,
        recipe=recipe,
        corpus=study.corpus,
        windows=study.windows,
        spans=cut.spans,
        num_layers=dense.num_layers,
        repairs=repairs,
        table=cut.table,
        evidence=evidence,
        measured_on=(study.corpus.name, held_out),
        versions=versions(),
        decision=decision,
    )
    if cut.contest is not None:
        record["contest"] = cut.contest.to_dict()
    return PrunedModel(
        model=multimodal.whole_of(pruned),
        dense=dense,
        recipe=recipe,
        spans=cut.spans,
        num_layers=dense.num_layers,
        repairs=repairs,
        table=cut.table,
        evidence=evidence,
        births=births,
        record=multimodal.described(dense.network) | record,
        decision=decision,
        contest=cut.contest,
        held_out=held_out,
        kept_in=study.kept_in,
    )

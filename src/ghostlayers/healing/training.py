"""The training run: a budget, steps, measurements, the best state, and what a killed run kept."""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ghostlayers.calibration.journal import Journal, KeptPass
from ghostlayers.errors import NonFiniteError, ResumeError, counted
from ghostlayers.healing import schedule
from ghostlayers.healing.adapters import adapters_of
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.healing.engine import Engine
from ghostlayers.healing.held_out import HeldOut
from ghostlayers.healing.outcome import Outcome
from ghostlayers.healing.parts import parts_of
from ghostlayers.healing.positions import draw_positions, weights_at
from ghostlayers.healing.rates import fitting_rates, work_of_trial
from ghostlayers.healing.state import State
from ghostlayers.healing.teaching import Teaching
from ghostlayers.healing.text import Text, first_occurrences
from ghostlayers.healing.trained import Trained, prepare, recording
from ghostlayers.model.residency import is_offloaded
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.runtime import launchers, progress
from ghostlayers.runtime.parallel import add_up, computing_together, from_first, shards, world
from ghostlayers.runtime.sizes import parse_memory

KEY = "healing"
"""What the journal knows a training run by."""

SOME = 0.25
"""Share of positions that are learnt from where the others' way through the head costs much."""

MUCH = 0.4
"""Of a token's work, that leaving these out must save."""


@dataclass
class Training:
    """A training run of one cut model.

    Attributes:
        cut: the model.
        recipe: what is trained, how long, and on what.
        read_text: reads so many windows of the training text, and the held-out ones, as the recipe
            that it is given says.
        batch_size: windows a call; 0 chooses.
        journal: keeps the state, where a run is to survive.
        train: go on; otherwise what a killed run kept is taken as it is.
    """

    cut: CutModel
    recipe: HealingRecipe
    read_text: Callable[[int, HealingRecipe], Text]
    batch_size: int = 0
    journal: Journal | None = None
    train: bool = True

    def run(self) -> Outcome:
        """Train within the budget.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; what was best is kept.
            ResumeError: what is kept belongs to another text.
        """
        parts = parts_of(self.cut, self.recipe)
        with computing_together() if shards() > 1 else nullcontext():
            trained = _prepare(self.cut, self.recipe, parts)
            with recording(trained):
                return self._run(trained, parts)

    def _run(self, trained: Trained, parts: tuple[str, ...]) -> Outcome:
        recipe, state = self.recipe, State.begin(trained, self.recipe.rates)
        engine = Engine(trained, recipe.loss, self.batch_size, frugal=_is_frugal(trained))
        work = work_of(self.cut, trained.start, parts, recipe)
        record = self._restored(state)
        if not state.steps:
            with state.timing():
                self._size(state, engine, work)
        if record is not None and recipe.writes:  # the same text is wanted when the run goes on
            record.keep(state.tensors())
        planned = state.planned * state.windows
        measuring = _measuring(recipe, planned * recipe.sequence_length, work)
        text = self.read_text(planned, measuring)
        self._check_text(state, text, record)
        if record is not None:
            record.begin(1, state.tensors())
        done = 0 if record is None else record.done
        with nullcontext() if done else state.timing():
            held_out = HeldOut(trained, text.held_out, self.batch_size)
        course = _Course(self, engine, state, held_out, work, record)
        if not done:
            spent = state.seconds
            course.look(0)
            look = state.seconds - spent
            with state.timing():
                self._fit_rates(state, engine, text.distinct(), work.share)
            course.shorten(look)
        text = text.first((state.steps if self.train else done) * state.windows)
        if self.train:
            course.go(done, self._teaching(engine, text, work.share, state.windows, done))
        return course.outcome(parts, text)

    def _restored(self, state: State) -> KeptPass | None:
        """What the journal holds of the run, put back into its state."""
        if self.journal is None:
            return None
        record = self.journal.next_pass(KEY, in_step=True)
        record.restore(state.tensors())
        state.trained.write_back()
        return record

    def _teaching(
        self, engine: Engine, text: Text, share: float, windows: int, done: int
    ) -> Teaching:
        """The lessons of the windows that this process takes, those of steps done left out."""
        firsts = first_occurrences(text.input_ids)
        positions = draw_positions(firsts, self.recipe.sequence_length, share, self.recipe.seed)
        own = [n for n in range(len(text.input_ids)) if world().takes(n % windows)]
        return Teaching(
            engine,
            text.input_ids,
            firsts,
            positions,
            own,
            sum(n < done * windows for n in own),
            most=parse_memory(self.recipe.cache),
            path=None if self.journal is None else self.journal.file_for(KEY),
            weights=weights_at(text.counts, positions),
        )

    def _fit_rates(self, state: State, engine: Engine, texts: torch.Tensor, share: float) -> None:
        """Lower the rates that nobody named to what the model bears on some windows."""
        places = self._open_rates(state)
        if not places or not self.train:
            return
        parts, highest = [state.parts[n] for n in places], state.rates[places]
        state.rates[places] = fitting_rates(engine, parts, highest, texts, share, state.room)

    def _open_rates(self, state: State) -> list[int]:
        """Places of the parts whose rates nobody named."""
        return [n for n, part in enumerate(state.parts) if part not in self.recipe.told_rates]

    def _size(self, state: State, engine: Engine, work: schedule.Work) -> None:
        """Steps, and windows of each, from the budget; of a time, about as many as it will hold.

        The work of a step that does not grow with its windows counts, too, so steps are timed at
        the size that they will have: a longer run, whose steps are larger, is timed once more.
        """
        recipe, length = self.recipe, self.recipe.sequence_length
        if recipe.num_tokens is not None:
            windows = self._windows_a_step(recipe.num_tokens)
            state.plan(schedule.steps_for(recipe.num_tokens, length, windows), windows)
            return
        assert recipe.seconds is not None
        began = time.perf_counter()
        trial = work_of_trial(len(self._open_rates(state)), length, work)
        windows, wanted = 0, self._windows_a_step(1)
        while wanted > windows:
            windows = wanted
            own = math.ceil(windows / world().size)
            step = from_first(self._seconds_a_step(state, engine, work.share, own))
            spent = from_first(time.perf_counter() - began) + trial * step / (own * length)
            tokens = schedule.time_to_train(recipe.seconds, spent) / step * windows * length
            wanted = self._windows_a_step(tokens)
        state.plan(schedule.steps_for(tokens, length, windows), windows, step)

    def _windows_a_step(self, tokens: float) -> int:
        """Windows of a step, of a run of so many tokens."""
        size = schedule.tokens_a_step(tokens, self.recipe.step_tokens)
        return max(world().size, size // self.recipe.sequence_length, 1)

    def _seconds_a_step(self, state: State, engine: Engine, share: float, count: int) -> float:
        """What a step of so many windows of its own takes this process."""
        length = self.recipe.sequence_length
        vocabulary = engine.dense.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (count, length), generator=generator)
        positions = draw_positions(range(count), length, share, 0)

        def step() -> float:
            began = time.perf_counter()
            engine.learn(engine.teach(ids, positions), positions.numel())
            state.trained.add_up_gradients()
            state.rehearse()
            return time.perf_counter() - began

        assert self.recipe.seconds is not None
        most = schedule.TRIALS[1]
        with progress.stage("Timing a step", most) as advance:
            taken = [step()]
            wanted = from_first(schedule.trials(self.recipe.seconds, taken[0]))
            advance(1 + most - wanted)
            for _ in range(1, wanted):
                taken.append(step())
                advance(1)
        state.forget()
        return schedule.steady(taken)

    def _check_text(self, state: State, text: Text, record: KeptPass | None) -> None:
        digest = hashlib.sha256(text.input_ids.contiguous().numpy().tobytes())
        digest.update(text.held_out.input_ids.contiguous().numpy().tobytes())
        text_digest = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        if record is not None and record.done and not torch.equal(text_digest, state.text):
            raise ResumeError(
                "the training text is another than when the interrupted run began; bring it back, "
                "or begin anew with --restart."
            )
        state.text.copy_(text_digest)


@dataclass
class _Course:
    """The steps of a run."""

    training: Training
    engine: Engine
    state: State
    held_out: HeldOut
    work: schedule.Work
    record: KeptPass | None

    @property
    def steps(self) -> int:
        """Of the run."""
        return self.state.steps

    @property
    def step_tokens(self) -> int:
        """Of all processes."""
        return self.state.windows * self.training.recipe.sequence_length

    def shorten(self, look: float) -> None:
        """To the steps that are left time for, now that a measurement's seconds are known."""
        seconds, step = self.training.recipe.seconds, self.state.step_seconds
        if seconds is None or not step:
            return
        least = min(self.steps, math.ceil(schedule.time_to_train(seconds, math.inf) / step))
        left = seconds - self.state.seconds
        count = schedule.steps_within(
            left, step, look, lambda n: len(self._looks(n)), (least, self.steps)
        )
        self.state.shorten(from_first(count))

    def _looks(self, steps: int) -> tuple[int, ...]:
        """The steps behind which a run of so many measures held-out windows."""
        held_out = self.held_out.windows.input_ids.numel()
        return schedule.looks(steps, self.step_tokens, held_out, self.work)

    def go(self, done: int, teaching: Teaching) -> None:
        """From so many steps to the last one."""
        looks = set(self._looks(self.steps))
        with progress.stage(self._title(), self.steps) as advance:
            advance(done)
            for step in range(done, self.steps):
                with self.state.timing():
                    self._step(step, teaching)
                if step + 1 in looks:
                    self.look(step + 1)
                if self.record is not None:
                    self.record.note(step + 1, self.state.tensors(), teaching.stores)
                advance(1)
        if self.record is not None:
            self.record.end(self.steps, self.state.tensors())

    def outcome(self, parts: tuple[str, ...], text: Text) -> Outcome:
        """What the run came to, with its best weights."""
        state, trained = self.state, self.state.trained
        best = state.best if state.best_step else trained.stored()
        return Outcome(
            network=trained.healed(best),
            parts=parts,
            num_trained=trained.num_trained,
            steps=len(text.input_ids) // state.windows,
            complete=len(text.input_ids) == state.steps * state.windows,
            step_tokens=self.step_tokens,
            share=self.work.share,
            best_step=state.best_step,
            looks=tuple(state.looks()),
            dense=self.held_out.dense_losses(),
            training_losses=tuple(state.training_losses()),
            rates=dict(zip(state.parts, state.rates.tolist(), strict=True)),
            seconds=state.seconds,
            text=text,
            adapters=adapters_of(best),
            adapted=trained.adapted,
        )

    def _title(self) -> str:
        tokens = self.steps * self.step_tokens
        return f"Training on {tokens:,} tokens, {counted(self.steps, 'step')}"

    def _step(self, step: int, teaching: Teaching) -> None:
        """One change of the weights."""
        windows = self.state.windows
        first = step * windows
        numbers = [n for n in range(first, first + windows) if world().takes(n - first)]
        sums = torch.zeros(1, dtype=torch.float64)
        total = teaching.total(range(first, first + windows)) or 1.0
        if numbers:
            lesson = teaching.lesson(numbers)
            if shards() > 1:  # all bring as many layers together
                lesson = lesson.filled(math.ceil(windows / shards()))
            sums += self.engine.learn(lesson, total)
        self.state.trained.add_up_gradients()
        add_up([sums])
        loss, norm = float(sums) / total, self.state.gradient_norm()
        _check_finite(step, loss, norm, self.state)
        self.state.step(schedule.rate(step, self.steps))
        self.state.note_loss(step, self.steps, float(sums), total)

    def look(self, step: int) -> None:
        """Measure the model as it would be saved, and keep it if it is the best so far."""
        with self.state.timing():
            stored = self.state.trained.stored()
            with self.state.trained.as_saved(stored) as network:
                measured = from_first(self.held_out.losses(network))
        by = "kl" if self.engine.guided else "loss"
        self.state.note_look(step, measured, stored, by)


def _check_finite(step: int, loss: float, norm: float, state: State) -> None:
    if torch.isfinite(torch.tensor([loss, norm])).all():
        return
    what = "loss" if not torch.isfinite(torch.tensor(loss)) else "gradient"
    raise NonFiniteError(
        f"the {what} of training step {step + 1} is NaN or infinite. The best state so far is that "
        f"behind step {state.best_step}; the same command with --keep writes it. To go further, "
        "take a lower --learning-rate, or --dtype float32."
    )


def work_of(
    cut: CutModel, start: int, parts: tuple[str, ...], recipe: HealingRecipe
) -> schedule.Work:
    """What a token costs, and the share of positions that is learnt from.

    Args:
        cut: the cut model.
        start: its first layer that runs beside the dense model's.
        parts: what is trained.
        recipe: the request.
    """
    dense = cut.dense
    layer = sum(tensor.numel() for tensor in dense.layers[0].parameters())
    head = dense.config.vocab_size * dense.hidden_size / max(1, layer)
    behind = float(cut.num_layers - start)
    passes = 2.0 if set(parts) <= {"operator", "norms"} else 3.0
    teacher = float(start if recipe.loss == "ce" else dense.num_layers)
    share = 1.0 if recipe.positions is None else recipe.positions
    work = schedule.Work(teacher, behind * passes, behind, head, share)
    saved = schedule.HEADS * head * (1.0 - SOME)
    leaves_out = recipe.positions is None and saved > MUCH * work.of_training
    return replace(work, share=SOME) if leaves_out else work


def _measuring(recipe: HealingRecipe, tokens: float, work: schedule.Work) -> HealingRecipe:
    """The recipe with as many held-out windows as a run of so many tokens pays for."""
    if recipe.held_out_windows is not None:
        return recipe
    count = schedule.held_out_windows(tokens, recipe.sequence_length, work)
    return replace(recipe, held_out_windows=count)


def _prepare(cut: CutModel, recipe: HealingRecipe, parts: tuple[str, ...]) -> Trained:
    if shards() == 1:
        return prepare(cut, recipe, parts)
    from ghostlayers.healing.sharding import prepare_shares  # FSDP takes its time to be imported

    return prepare_shares(cut, recipe, parts)


def _is_frugal(trained: Trained) -> bool:
    return is_frugal(trained.cut, trained.start, offloaded=is_offloaded(trained.network))


def is_frugal(cut: CutModel, start: int, *, offloaded: bool) -> bool:
    """Whether layers run again in the backward pass.

    So they do where what they keep would be gigabytes, where their weights go between calls, and
    where the launcher asks for it (``--fsdp_activation_checkpointing true``).

    Args:
        cut: the cut model.
        start: its first layer that runs beside the dense model's.
        offloaded: whether its weights go between calls.
    """
    numbers = cut.dense.hidden_size * (cut.num_layers - start)
    asked = shards() > 1 and launchers.is_on(launchers.FSDP_CHECKPOINTS)
    return asked or offloaded or numbers > 2**16

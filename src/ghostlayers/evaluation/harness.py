"""The one room that knows lm-evaluation-harness. Imported only when tasks are asked for."""

import contextlib
import copy
import io
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ghostlayers.errors import CorpusError, RecipeError, near_names
from ghostlayers.progress import Advance, Progress

HARNESS_SEEDS = (0, 1234)
"""What the harness starts Python's generator and all others from, so that its prompts come out."""

LOOKED_AT = 16
"""Documents of a task that tell how long all of them are."""

NAMED = 3
"""A bar names so many tasks; of more it says the number."""


class QuietModel(HFLM):
    """A model in memory whose requests move our progress instead of drawing bars.

    Attributes:
        truncated: by task, the requests whose prompt lost its beginning to fit the model.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: Progress) -> None:
        self._progress, self._screen = progress, sys.stderr  # before it is silenced
        with quiet():
            # A padding token is set on the tokenizer, which is not ours to change.
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                backend="causal",
                batch_size=batch_size,
            )
        self.truncated: Counter[str] = Counter()
        self._names: list[str] = []

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        del disable_tqdm
        self._names = [request.task_name for request in requests]
        tasks = list(dict.fromkeys(self._names))
        title = f"Answering {', '.join(tasks) if len(tasks) <= NAMED else f'{len(tasks)} tasks'}"
        with (
            contextlib.redirect_stderr(self._screen),
            self._progress.stage(title, len(requests)) as advance,
        ):
            self.set_cache_hook(_Counting(advance))
            return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for name, (_, context, continuation) in zip(self._names, requests, strict=True):
            self.truncated[name] += len(context) + len(continuation) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, *args, **kwargs)


class _Counting:
    """Told of every answered request, where the harness would store it."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def add_partial(self, kind: str, request: Any, result: Any) -> None:
        del kind, request, result
        self._advance()


def find_tasks(names: Sequence[str], folder: Path | None) -> TaskManager:
    """The index that knows all of these tasks.

    Where the folder alone holds them, the harness's own fifteen thousand are not even listed.

    Raises:
        RecipeError: a name that neither the folder nor the harness knows.
    """
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    every = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in every.all_tasks:
            where = "" if folder is None else f", nor in '{folder}'"
            raise RecipeError(
                f"lm-evaluation-harness {lm_eval.__version__} knows no task '{name}'{where}. "
                f"{near_names(name, every.all_tasks)}"
            )
    return every


def load_tasks(manager: TaskManager, names: Sequence[str], seed: int | None) -> dict[str, Any]:
    """Tasks with their documents, by name; groups and tags become the tasks in them.

    Each is seeded for itself: its documents do not depend on the tasks beside it.

    Raises:
        CorpusError: the documents cannot be read.
    """
    tasks: dict[str, Any] = {}
    for name in names:
        with _seeded(seed), quiet():
            try:
                tasks.update(manager.load([name])["tasks"])
            except Exception as error:  # data sets, hubs and tasks' own code raise anything
                raise CorpusError(
                    f"cannot read task '{name}': {_first_line(error)}. Its documents come from "
                    "where its file says, usually the Hugging Face hub: check the connection, or "
                    "give --tasks-path a folder of task files that read local ones."
                ) from error
    return tasks


def run_tasks(
    model: QuietModel, tasks: dict[str, Any], limit: int | None, seed: int | None
) -> dict[str, Any]:
    """The harness's own results, with every document's.

    This is what its ``simple_evaluate`` does, less the description of the machine that it adds by
    running git and other programs.
    """
    with _seeded(seed), quiet():
        _set_fewshot(tasks, seed)
        results: dict[str, Any] = lm_eval.evaluate(
            lm=model,
            task_dict={"tasks": tasks},
            limit=limit,
            bootstrap_iters=0,  # errors of accuracies have a closed form
            log_samples=True,
        )
    return results


def _set_fewshot(tasks: dict[str, Any], seed: int | None) -> None:
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_seeds(seed)[1])


def count_tokens(tasks: dict[str, Any], tokenizer: Any, limit: int | None, seed: int | None) -> int:
    """About how many tokens one model reads to answer tasks: the first documents stand for all."""
    total = 0.0
    with _seeded(seed), quiet():
        _set_fewshot(tasks, seed)
        for task in tasks.values():
            count = min(len(task.eval_docs), limit or len(task.eval_docs))
            looked_at = min(count, LOOKED_AT)
            task.build_all_requests(limit=looked_at, rank=0, world_size=1)
            texts = ["".join(map(str, each.args[:2])) for each in task.instances]
            total += sum(map(len, tokenizer(texts)["input_ids"])) * count / looked_at
    return round(total)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's log and bars off the screen; most of its bars have no switch."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    shown = datasets.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed the global generators that tasks shuffle with, and restore them afterwards."""
    states = random.getstate(), np.random.get_state()
    first, others = _seeds(seed)
    random.seed(first)
    np.random.seed(others)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _seeds(seed: int | None) -> tuple[int, int]:
    return HARNESS_SEEDS if seed is None else (seed, seed)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")

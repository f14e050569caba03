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
from typing import TYPE_CHECKING, Any, NoReturn

import datasets
import jinja2
import lm_eval
import lm_eval.utils
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from ghostlayers.errors import CorpusError, RecipeError, WindowError, first_line, near_names
from ghostlayers.runtime import progress
from ghostlayers.runtime.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int,
    ) -> None:
        self._screen = sys.stderr  # before it is silenced
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
        with self._answering(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        del disable_tqdm
        for request in requests:
            prompt, new = request.args[0], new_tokens_of(request)
            if new >= self.max_length:
                raise WindowError(
                    f"task '{request.task_name}' lets a model write {new} tokens, but this one has "
                    f"{self.max_length} positions; set max_gen_toks under generation_kwargs in the "
                    "task's file, or take another task."
                )
            known = len(self.tok_encode(prompt))
            self.truncated[request.task_name] += known > self.max_length - new
        with self._answering(requests):
            return super().generate_until(requests, disable_tqdm=True)

    @contextlib.contextmanager
    def _answering(self, requests: Any) -> Iterator[None]:
        """Show how many requests are answered."""
        self._names = [request.task_name for request in requests]
        tasks = list(dict.fromkeys(self._names))
        title = f"Answering {', '.join(tasks) if len(tasks) <= NAMED else f'{len(tasks)} tasks'}"
        with (
            contextlib.redirect_stderr(self._screen),
            progress.stage(title, len(requests)) as advance,
        ):
            self.set_cache_hook(_Counting(advance))
            yield

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


def new_tokens_of(request: Any) -> int:
    """Tokens that a model may write to answer a request; 0 where it is to score an option."""
    settings = request.args[1] if len(request.args) > 1 else None
    if not isinstance(settings, dict):
        return 0
    return int(normalize_gen_kwargs(settings)["max_gen_toks"])


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


def load_tasks(
    manager: TaskManager, names: Sequence[str], seed: int | None, *, trusted: bool
) -> dict[str, Any]:
    """Tasks with their documents, by name; groups and tags become the tasks in them.

    Each is seeded for itself: its documents do not depend on the tasks beside it.

    Raises:
        CorpusError: the documents cannot be read.
        RecipeError: a metric is a program from the hub, and those may not run.
    """
    tasks: dict[str, Any] = {}
    for name in names:
        with _seeded(seed), quiet(), fenced(trusted=trusted):
            try:
                tasks.update(manager.load([name])["tasks"])
            except jinja2.TemplateError:
                raise
            except Exception as error:  # data sets, hubs and tasks' own code raise anything
                raise CorpusError(
                    f"cannot read task '{name}': {_cause(error)}. Its documents come from "
                    "where its file says, usually the Hugging Face hub: check the connection, or "
                    "give --tasks-path a folder of task files that read local ones."
                ) from error
    for name, task in tasks.items():
        _check_metrics(name, task)
    return tasks


def _check_metrics(name: str, task: Any) -> None:
    known = getattr(task, "_metric_fn_list", {})  # a task that is a Python class has none
    unknown = [metric for metric, measure in known.items() if measure is None]
    if unknown and task.config.process_results is None:
        raise RecipeError(
            f"task '{name}' measures {', '.join(map(str, unknown))}, which is not among "
            "lm-evaluation-harness's own metrics. Those of the hub are programs: read them, then "
            "allow it with --trust-tasks (trust_tasks=True)."
        )


def run_tasks(
    model: QuietModel,
    tasks: dict[str, Any],
    limit: int | None,
    seed: int | None,
    *,
    trusted: bool,
) -> dict[str, Any]:
    """The harness's own results, with every document's.

    This is what its ``simple_evaluate`` does, less the description of the machine that it adds by
    running git and other programs.

    Raises:
        CorpusError: a template does not fit a document.
    """
    with _seeded(seed), quiet(), fenced(trusted=trusted):
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


def count_tokens(
    tasks: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None,
    seed: int | None,
    *,
    trusted: bool,
) -> int:
    """About how many tokens one model computes to answer tasks: the first documents stand for all.

    Of an answer that it writes as many are counted as it may write.
    """
    total = 0.0
    with _seeded(seed), quiet(), fenced(trusted=trusted):
        _set_fewshot(tasks, seed)
        for task in tasks.values():
            count = min(len(task.eval_docs), limit or len(task.eval_docs))
            looked_at = min(count, LOOKED_AT)
            task.build_all_requests(limit=looked_at, rank=0, world_size=1)
            texts = ["".join(_texts_of(request)) for request in task.instances]
            known = sum(map(len, tokenizer(texts)["input_ids"]))
            total += (known + sum(map(new_tokens_of, task.instances))) * count / looked_at
    return round(total)


def _texts_of(request: Any) -> list[str]:
    return [text for text in request.args[:2] if isinstance(text, str)]


@contextlib.contextmanager
def fenced(*, trusted: bool) -> Iterator[None]:
    """Let templates of task files reach their documents only, and metrics of the hub not run.

    The harness renders with one environment of its own, for which a sandboxed one stands in, and
    looks for metrics that it does not know in ``evaluate``, which runs what it downloads.

    Raises:
        CorpusError: a template does not fit a document, or wants out of its sandbox.
    """
    if trusted:
        yield
        return
    template, evaluate = lm_eval.utils.env, sys.modules.get("evaluate", _NEVER)
    lm_eval.utils.env = _sandbox(template)
    sys.modules["evaluate"] = None  # type: ignore[assignment]
    try:
        yield
    except jinja2.TemplateError as error:
        raise CorpusError(
            f"a task's template cannot be filled in: {_cause(error)}. Templates run in a "
            "sandbox and see their document only; --trust-tasks lets them see everything."
        ) from error
    finally:
        lm_eval.utils.env = template
        del sys.modules["evaluate"]
        if evaluate is not _NEVER:
            sys.modules["evaluate"] = evaluate


_NEVER: Any = object()


class _Sandbox(ImmutableSandboxedEnvironment):
    """Where whatever goes wrong is the template's fault."""

    def handle_exception(self, source: str | None = None) -> NoReturn:
        del source
        error = sys.exc_info()[1]
        if isinstance(error, jinja2.TemplateError):
            raise error
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


def _sandbox(like: jinja2.Environment) -> jinja2.Environment:
    sandbox = _Sandbox(
        loader=like.loader,
        undefined=like.undefined,
        keep_trailing_newline=like.keep_trailing_newline,
    )
    sandbox.filters.update(like.filters)
    return sandbox


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


def _cause(error: Exception) -> str:
    return first_line(error)[:300].rstrip(".")

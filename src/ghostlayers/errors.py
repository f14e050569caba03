"""Every error that Ghostlayers raises on purpose.

GhostlayersError
├── InputError (also a ValueError)
│   ├── SpanError               layers that do not exist, overlap, or are too many
│   ├── CorpusError             a corpus that cannot be found or read, or that is too short
│   ├── WindowError             a window that the model or the text cannot give
│   ├── RecipeError             an option or a recipe key that means nothing
│   ├── ModelError              a model that cannot be found or read
│   │   └── UnsupportedModelError   a family whose layers cannot be removed correctly (yet)
│   └── OutputError             an output folder that exists, or a disk that is full
├── NumericalError (also an ArithmeticError)
│   ├── NonFiniteError          NaN or infinity in the residual stream
│   ├── InsufficientTokensError fewer calibration tokens than the fit has unknowns
│   ├── SingularError           normal equations that cannot be solved as asked
│   └── NoGainError             training that made a model no better
├── DependencyError             an optional package that is not installed
├── VerificationError           a saved checkpoint that does not reload as it was in memory
├── DownloadError               a named download that failed or whose hash differs
├── DistributedError            a process of the run that stopped, or holds something else
└── ResumeError                 what an interrupted run kept belongs to another request
"""

import difflib
from collections.abc import Collection, Iterable
from itertools import islice


class GhostlayersError(Exception):
    """Base of all errors that a user of Ghostlayers can cause or meet."""


class InputError(GhostlayersError, ValueError):
    """Something that the caller named does not exist or does not fit."""


class SpanError(InputError):
    """Layers to remove that do not exist, overlap, or leave nothing."""


class CorpusError(InputError):
    """A corpus that cannot be found or read."""


class WindowError(InputError):
    """A window length or number that the model or the text cannot give."""


class RecipeError(InputError):
    """An option that means nothing, or two that contradict each other."""


class ModelError(InputError):
    """A model that cannot be found or read."""


class UnsupportedModelError(ModelError):
    """A model family whose layers Ghostlayers cannot remove correctly."""


class OutputError(InputError):
    """An output that exists already or cannot be written."""


class DistributedError(GhostlayersError):
    """A process of the run that stopped, or that holds another model, text or decision."""


class ResumeError(InputError):
    """What an interrupted run kept belongs to another request."""


class NumericalError(GhostlayersError, ArithmeticError):
    """Numbers that make a fit impossible."""


class NonFiniteError(NumericalError):
    """NaN or infinity in the residual stream."""


class InsufficientTokensError(NumericalError):
    """Fewer calibration tokens than unknowns in the fit."""


class SingularError(NumericalError):
    """Normal equations without a unique, finite solution."""


class NoGainError(NumericalError):
    """Training that made a model no better on held-out text."""


class DependencyError(GhostlayersError):
    """An optional package that is needed and not installed."""


class VerificationError(GhostlayersError):
    """A saved checkpoint that differs from the model in memory after reloading."""


class DownloadError(GhostlayersError):
    """A download that failed, or whose content is not what was expected."""


def shortened(text: object, most: int = 60) -> str:
    """Text from outside as a message may hold it: no longer than a name may sensibly be."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[: most - 3]}..."


def counted(number: int, what: str) -> str:
    """So many of something: ``1 layer``, ``2 layers``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def listed(names: Collection[object], most: int = 12) -> str:
    """Names from outside as a message may hold them: some of them, and how many more there are."""
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*map(shortened, islice(names, most)), *more])


def suggest(name: str, known: Iterable[str], most: int = 50) -> str:
    """Say which known name is near, and list them: the tail of an unknown-name message.

    Args:
        name: what was asked for.
        known: what there is.
        most: names that are listed; by default all, if they are ours.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(shortened(name), map(shortened, choices), 1, 0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Known: {listed(choices, most)}."


def near_names(name: str, known: Iterable[str]) -> str:
    """Say which names are near, where there are too many to list them all."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=5, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    return f"{hint}{len(choices):,} names are known."


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its type, if it says nothing."""
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0], 500)

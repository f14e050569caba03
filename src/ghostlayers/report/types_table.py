"""What the GGUF files of a comparison say: their numbers in a table, and in one sentence."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ghostlayers.errors import counted
from ghostlayers.report.results import Results
from ghostlayers.report.rows import FileLoss, Key, ModelFile
from ghostlayers.report.summary import mean
from ghostlayers.report.words import decimal, whole

ERRORS = 2.0
"""Standard errors of a difference within which two losses are called equal."""

HEAD = (
    *("model", "type", "MB", "loss", "above F16", "KL to F16", "prefill, tokens/s"),
    *("decode, tokens/s", "memory, MB"),
)


@dataclass(frozen=True)
class File:
    """One GGUF file with its means over the texts.

    Attributes:
        key: which model.
        row: what was measured without a text.
        loss: nats a token, the mean of all texts; None unless each was measured.
        kl: mean divergence from the dense model's F16 file.
        windows: losses of each text's windows.
    """

    key: Key
    row: ModelFile
    loss: float | None
    kl: float | None
    windows: tuple[tuple[float, ...], ...]

    @property
    def kind(self) -> str:
        """Its type."""
        return self.row.type

    @property
    def title(self) -> str:
        """Its model, in words."""
        return model_title(self.key)


def model_title(key: Key) -> str:
    """A model of a comparison in words."""
    return (
        "dense"
        if key.is_dense
        else f"{counted(key.layers, 'layer')} less ({key.select}), {key.repair}"
    )


def files_of(results: Results) -> list[File]:
    """The files in the order of the results: models as they come, and their types."""
    names = [text.name for text in results.corpora]
    known = {(row.key, row.type, row.corpus): row for row in results.file_losses}
    return [
        _file(row, [known.get((row.key, row.type, name)) for name in names])
        for row in results.files
    ]


def _file(row: ModelFile, losses: Sequence[FileLoss | None]) -> File:
    known_losses = [loss for loss in losses if loss is not None]
    whole_row = known_losses if len(known_losses) == len(losses) else []
    return File(
        row.key,
        row,
        mean(row.loss_nats for row in whole_row),
        mean(row.kl_nats for row in whole_row),
        tuple(tuple(v for v in row.window_losses if v is not None) for row in whole_row),
    )


def file_grid(results: Results) -> tuple[Sequence[str], list[list[str]]]:
    """Names of columns, and a row a file."""
    files = files_of(results)
    plain = next((f.loss for f in files if f.key.is_dense and f.kind == "F16"), None)
    return HEAD, [_cells(file, plain) for file in files]


def _cells(file: File, plain: float | None) -> list[str]:
    row = file.row
    above = None if file.loss is None or plain is None else file.loss - plain
    memory = None if row.memory_bytes is None else row.memory_bytes / 1e6
    return [
        *(file.title, file.kind, f"{row.size_bytes / 1e6:,.1f}", decimal(file.loss)),
        *(decimal(above), decimal(file.kl), _rounded(row.prefill_tokens_s)),
        *(_rounded(row.decode_tokens_s), whole(memory)),
    ]


def _rounded(rate: float | None) -> str:
    """Tokens a second: slow ones with a decimal."""
    return whole(rate) if rate is None or rate >= 100 else decimal(rate, 1)


def difference(one: File, other: File) -> tuple[float, float]:
    """One file's loss above another's on the same windows, and the standard error of that.

    The mean over texts of the mean over windows; of a single window the error is not known, and
    taken for infinite.
    """
    apart = [
        [a - b for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(one.windows, other.windows, strict=True)
    ]
    variances = [statistics.variance(d) / len(d) if len(d) > 1 else math.inf for d in apart]
    return statistics.fmean(map(statistics.fmean, apart)), math.sqrt(sum(variances)) / len(apart)


def says(files: Sequence[File]) -> str:
    """What the files say of cutting and quantising this model, in one sentence; "" if nothing.

    Of each cut and type the repair of lowest loss is set against the dense files that are no
    larger, and against those that write at least as fast, within the spread of the two. Losses
    within two standard errors of their difference on the same windows count as equal.
    """
    known = [file for file in files if file.loss is not None and file.windows]
    dense = [file for file in known if file.key.is_dense]
    cuts = best_repaired(file for file in known if not file.key.is_dense)
    if not dense or not cuts:
        return ""
    parts = [_clause(dense, cuts, _BYTES)]
    timed = [file for file in (*dense, *cuts) if file.row.decode_tokens_s]
    if len(timed) == len(dense) + len(cuts):
        parts.append(_clause(dense, cuts, _SPEED))
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def best_repaired(files: Iterable[File]) -> list[File]:
    """Of each cut and type the file of lowest loss."""
    best: dict[tuple[int, str, str], File] = {}
    for file in files:
        place = (*file.key.cut, file.kind)
        if place not in best or (file.loss or 0.0) < (best[place].loss or 0.0):
            best[place] = file
    return list(best.values())


@dataclass(frozen=True)
class _Cost:
    """A cost at which cut and dense files are compared.

    Attributes:
        begins: the clause.
        no_worse: whether a dense file costs no more than a cut one.
        matched: a dense file that costs no more, in words.
        beyond: what cut files are that no dense one matches, with the best of both.
    """

    begins: str
    no_worse: Callable[[File, File], bool]
    matched: str
    beyond: Callable[[Sequence[File], Sequence[File]], str]


def _as_fast(dense: File, cut: File) -> bool:
    spread = max(dense.row.decode_spread or 0.0, cut.row.decode_spread or 0.0)
    return _rate(dense) >= _rate(cut) * (1 - spread)


def _rate(file: File) -> float:
    return file.row.decode_tokens_s or 0.0


def _smaller(dense: Sequence[File], cuts: Sequence[File]) -> str:
    least = [min(files, key=lambda f: f.row.size_bytes) for files in (cuts, dense)]
    sizes = [f"{file.row.size_bytes / 1e6:,.0f} MB" for file in least]
    return f"smaller than any dense one ({sizes[0]} at least, against {sizes[1]})"


def _faster(dense: Sequence[File], cuts: Sequence[File]) -> str:
    most = [_rounded(max(map(_rate, files))) for files in (cuts, dense)]
    return f"faster than any dense one ({most[0]} tokens a second at most, against {most[1]})"


_BYTES = _Cost(
    "for bytes alone",
    lambda dense, cut: dense.row.size_bytes <= cut.row.size_bytes,
    "a dense one that is no larger",
    _smaller,
)
_SPEED = _Cost("at the same speed", _as_fast, "a dense one that writes as fast", _faster)


def _clause(dense: Sequence[File], cuts: Sequence[File], cost: _Cost) -> str:
    """Who wins at equal cost, counted, and how many cut files no dense one matches."""
    signs: list[int] = []
    beyond: list[File] = []
    for cut in cuts:
        rivals = [file for file in dense if cost.no_worse(file, cut)]
        if not rivals:
            beyond.append(cut)
            continue
        apart, error = difference(cut, min(rivals, key=lambda file: file.loss or 0.0))
        signs.append(0 if abs(apart) <= ERRORS * error else 1 if apart > 0 else -1)
    more = (
        f"{_files(len(beyond))} {_is(len(beyond))} {cost.beyond(dense, beyond)}" if beyond else ""
    )
    if not signs:
        return f"{cost.begins} there is nothing to compare: {more}"
    clause = f"{cost.begins}, {_advice(signs)}: {_counted(signs, cost.matched)}"
    return f"{clause}, and {more}" if more else clause


def _advice(signs: Sequence[int]) -> str:
    if set(signs) == {1}:
        return "quantise"
    if set(signs) == {-1}:
        return "cut"
    return "neither is always better"


def _counted(signs: Sequence[int], rival: str) -> str:
    """How many cut files lose more, less, and as much."""
    words = {
        1: f"more than {rival}",
        -1: f"less than {rival}",
        0: f"as much as {rival}, within error",
    }
    counts = {sign: list(signs).count(sign) for sign in words}
    parts = [
        f"{_files(n)} {'loses' if n == 1 else 'lose'} {words[s]}" for s, n in counts.items() if n
    ]
    return ", ".join(parts)


def _files(count: int) -> str:
    return counted(count, "cut file")


def _is(count: int) -> str:
    return "is" if count == 1 else "are"

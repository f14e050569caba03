"""Faults one after another, in as many lanes as there are cores, and what became of each."""

import json
import os
import queue
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from faults import materials
from faults.judge import Said, Verdict, judge
from faults.kinds import FAMILIES
from faults.materials import Place, Plan
from faults.zygote import Zygote

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"
IMPORTED = ["ghostlayers.cli.prune", "ghostlayers.pipeline", "ghostlayers.checkpoint.saving"]
IMPORTED += [
    "ghostlayers.checkpoint.gguf_export",
    "ghostlayers.model.gguf_file",
    "ghostlayers.checkpoint.adapter",
]
IMPORTED += ["transformers.models.llama.modeling_llama", "datasets", "faults.truth"]
IMPORTED += [f"ghostlayers.cli.{each}" for each in ("evaluate", "score", "compare", "run", "push")]
IMPORTED += ["ghostlayers.cli.export", "ghostlayers.cli.materialize", "ghostlayers.cli.inspection"]
MEMORY = 6 << 30
TEXT = "in/text.txt"


@dataclass(frozen=True)
class Result:
    """What became of one fault.

    Attributes:
        family: of faults.
        index: within it; with the seed it says all.
        label: what was done.
        arguments: of the command.
        kind: of the verdict.
        reason: of the verdict.
        seconds: it took.
    """

    family: str
    index: int
    label: str
    arguments: str
    kind: str
    reason: str
    seconds: float


class Lane:
    """Where faults happen one after another: two zygotes and a folder.

    Args:
        home: a folder of its own.
        templates: as `materials.make_all` made them.
    """

    def __init__(self, home: Path, templates: Path) -> None:
        self.home, self.templates, self._count = home, templates, 0
        self.environment = environment(home)
        reload = ["transformers.models.llama.modeling_llama", "safetensors.torch"]
        self.reload = Zygote(reload, self.environment, isolated=True)
        self.zygote = Zygote(IMPORTED, self.environment)

    def close(self) -> None:
        """End it."""
        self.zygote.close()
        self.reload.close()

    def place(self, name: str, rng: random.Random) -> Place:
        """An empty folder; the last of that name goes."""
        self._count += 1
        for last in self.home.glob(f"{name}-*"):
            shutil.rmtree(last, ignore_errors=True)  # what was killed may still be ending
        root = self.home / f"{name}-{self._count}"
        (root / "tmp").mkdir(parents=True)
        (root / "in").mkdir()
        own = {"TMPDIR": str(root / "tmp"), "HOME": str(root / "home")}
        return Place(root, self.templates, rng, {**self.environment, **own})

    def run(self, place: Place, plan: Plan, name: str = "said") -> Said:
        """One command, to its end or to its limit of time."""
        started = self.start(place, plan, name)
        code = started.wait(plan.seconds)
        texts = [read(place.root / name / stream) for stream in ("stdout", "stderr")]
        return Said(code, *texts)

    def start(self, place: Place, plan: Plan, name: str = "said") -> Any:
        """Begin a command."""
        return self.zygote.start(
            {
                "argv": [str(each) for each in plan.arguments],
                "cwd": str(place.root),
                "env": place.environment,
                "said": str(place.root / name),
                "limits": {"memory": MEMORY, **plan.limits},
                "reload": self.reload.socket,
                **({} if plan.hook is None else {"hook": plan.hook}),
            }
        )

    def call(self, place: Place, function: str, **arguments: Any) -> dict[str, Any]:
        """A function of the campaign's own, in a fork: what it gives."""
        answer = place.root / "said" / "answer.json"
        answer.parent.mkdir(exist_ok=True)
        answer.unlink(missing_ok=True)
        self.zygote.start(
            {
                "function": function,
                "argv": arguments,
                "answer": str(answer),
                "cwd": str(place.root),
                "env": place.environment,
                "said": str(place.root / "said" / "truth"),
                "limits": {"memory": MEMORY},
            }
        ).wait(60)
        if not answer.is_file():
            return {"refuse": f"no answer: {read(answer.parent / 'truth' / 'stderr')[-300:]}"}
        return json.loads(answer.read_text())

    def truth(self, place: Place) -> Any:
        """The oracle of a place."""

        def found(folder: str, drop: list[int]) -> dict[str, Any]:
            return self.call(
                place, "faults.truth:loss_of", folder=folder, text=TEXT, length=32, windows=4,
                drop=drop,
            )  # fmt: skip

        return found

    def fault(self, family: str, index: int, seed: int) -> Result:
        """Make one fault, run it, judge it."""
        began = time.monotonic()
        place = self.place("place", random.Random(f"{seed}/{family}/{index}"))
        found = FAMILIES[family].make(place, index)
        if isinstance(found, Plan):
            plan, verdict = found, self.attempt(place, found)
        else:
            plan, verdict = found.carry_out(self, place)
        arguments = " ".join(str(each) for each in plan.arguments)[:300]
        seconds = round(time.monotonic() - began, 2)
        return Result(family, index, plan.label, arguments, verdict.kind, verdict.reason, seconds)

    def attempt(self, place: Place, plan: Plan, name: str = "said") -> Verdict:
        """Run a plan and judge it."""
        plan.there = tuple(path.name for path in place.root.iterdir())
        before = materials.digest(place.inputs)
        said = self.run(place, plan, name)
        after = materials.digest(place.inputs)
        return judge(place, plan, said, before, after, self.truth(place))


def environment(home: Path) -> dict[str, str]:
    """What every command is started with: no network, one thread, an ordinary screen."""
    paths = [str(SOURCE), str(HERE.parent)]
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "hf"),
        "COLUMNS": "200",
        "LANG": "C.UTF-8",
    }


def read(path: Path) -> str:
    """What a stream holds; odd bytes stay visible as control characters."""
    return path.read_bytes().decode("utf-8", "backslashreplace") if path.is_file() else ""


def make_templates(lane: Lane) -> None:
    """Models by transformers, results by the command line, once."""
    place = lane.place("templates-made", random.Random(0))
    place.inputs.rmdir()
    place.inputs.symlink_to(lane.templates)
    if failed := lane.call(place, "faults.materials:make_all", folder=str(lane.templates)):
        raise SystemExit(f"cannot make the models: {failed}")
    for name in materials.RESULTS:
        said = lane.run(place, Plan(materials.command_of(name), name))
        if said.code != 0:
            raise SystemExit(f"cannot make '{name}': {said.both[-2000:]}")
    for lock in lane.templates.glob(".*"):
        shutil.rmtree(lock) if lock.is_dir() else lock.unlink()


def run_all(
    faults: Sequence[tuple[str, int]], seed: int, lanes: int, home: Path
) -> Iterator[Result]:
    """Every fault, as they end."""
    templates = home / "templates"
    made = [Lane(home / f"lane-{number}", templates) for number in range(lanes)]
    waiting: queue.Queue[tuple[str, int]] = queue.Queue()
    for fault in faults:
        waiting.put(fault)
    done: queue.Queue[Result | None] = queue.Queue()
    try:
        make_templates(made[0])
        for lane in made:
            threading.Thread(target=_drain, args=(lane, waiting, seed, done), daemon=True).start()
        for _ in faults:
            result = done.get()
            assert result is not None
            yield result
    finally:
        for lane in made:
            lane.close()


def _drain(lane: Lane, waiting: Any, seed: int, done: Any) -> None:
    while True:
        try:
            family, index = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            done.put(lane.fault(family, index, seed))
        except Exception as error:  # a fault of the campaign itself is shown as one
            reason = f"{type(error).__name__}: {error}"
            done.put(Result(family, index, "the campaign itself", "", "campaign", reason, 0.0))


def chosen(total: int, only: Mapping[str, list[int]] | None = None) -> list[tuple[str, int]]:
    """So many faults, spread over the families by their weight; the same for the same total."""
    if only:
        return [(family, index) for family, indices in only.items() for index in indices]
    weights = {name: family.weight for name, family in FAMILIES.items()}
    share = total / sum(weights.values())
    found = [
        (name, index)
        for name, family in FAMILIES.items()
        for index in range(family.count(max(1, round(weights[name] * share))))
    ]
    random.Random(0).shuffle(found)
    return found


def table(results: Sequence[Result]) -> str:
    """Families by what became of their faults, then promises by how often they broke."""
    from faults.judge import PROMISES

    lines = ["| faults | tried | right | refused by name | wrong |", "|---|--:|--:|--:|--:|"]
    for family in FAMILIES:
        own = [each for each in results if each.family == family]
        counts = [sum(each.kind == kind for each in own) for kind in ("ok", "clean")]
        if own:
            wrong = len(own) - sum(counts)
            lines.append(f"| {family} | {len(own)} | {counts[0]} | {counts[1]} | {wrong} |")
    ok, clean = (sum(each.kind == kind for each in results) for kind in ("ok", "clean"))
    lines.append(
        f"| **all** | **{len(results)}** | **{ok}** | **{clean}** | "
        f"**{len(results) - ok - clean}** |"
    )
    lines += ["", "| what would be wrong | seen |", "|---|--:|"]
    for kind, promise in {**PROMISES, "campaign": "a fault of the campaign itself"}.items():
        lines.append(f"| {promise} | {sum(each.kind == kind for each in results)} |")
    return "\n".join(lines)


def listed(results: Sequence[Result]) -> str:
    """Every wrong one, so that it can be made again."""
    wrong = [each for each in results if each.kind not in ("ok", "clean")]
    return "\n".join(
        f"- `{each.family}:{each.index}` {each.kind}: {each.label}: {each.reason} "
        f"(`{each.arguments}`)"
        for each in sorted(wrong, key=lambda each: (each.kind, each.family, each.index))
    )


def campaign(
    total: int, seed: int, lanes: int, only: Mapping[str, list[int]] | None, seconds: float
) -> list[Result]:
    """The whole of it; shows where it is on the error stream."""
    faults = chosen(total, only)
    results: list[Result] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as home:
        for result in run_all(faults, seed, lanes, Path(home)):
            results.append(result)
            if result.kind not in ("ok", "clean") or len(results) % 50 == 0:
                print(
                    f"[{time.monotonic() - began:6.0f} s {len(results)}/{len(faults)}] "
                    f"{result.family}:{result.index} {result.kind} {result.label}: {result.reason}",
                    file=sys.stderr,
                    flush=True,
                )
            if time.monotonic() - began > seconds:
                print("out of time; the rest was not tried", file=sys.stderr)
                break
    return results


def to_json(results: Sequence[Result]) -> str:
    """Every fault, one a line."""
    return "".join(json.dumps(asdict(each)) + "\n" for each in results)

"""Memory and time of calibration text: sources from megabytes to gigabytes, the same few windows.

Makes its sources in a temporary folder, one after the other, and deletes each when it is measured.
Every measurement is a process of its own; its memory is the peak beyond what it had once all was
imported. The tokenizer is a byte-level BPE trained here, or the one of --tokenizer.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

MEGABYTE = 1_000_000
SOURCES = {"txt": (3, 300, 2000), "jsonl": (10000,)}
WORDS = ("river", "engine", "garden", "letter", "window", "mountain", "signal", "harbour")


def paragraphs(count: int, seed: int) -> list[str]:
    """Sentences without sense, from words with and without endings."""
    rng = random.Random(seed)

    def sentence() -> str:
        words = (rng.choice(WORDS) + rng.choice(("", "s", "ing", "ed")) for _ in range(12))
        return " ".join(words).capitalize() + f" {rng.randrange(10**6)}."

    return [" ".join(sentence() for _ in range(rng.randrange(2, 9))) for _ in range(count)]


def make_source(path: Path, megabytes: int) -> None:
    """Write a file of a size: the same paragraphs again and again, each time numbered."""
    some, size, number = paragraphs(2000, 0), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * MEGABYTE:
            number += 1
            size += file.write("".join(line(path, f"{number}. {each}") for each in some))


def line(path: Path, text: str) -> str:
    """One paragraph as its file has it."""
    return json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text + "\n\n"


def make_tokenizer(folder: str | None) -> Any:
    """The tokenizer of a folder, or one that is trained on a few paragraphs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        paragraphs(500, 1), trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


def measure(path: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Draw windows of a source in this process."""
    import datasets  # noqa: F401  what reading some sources imports is no cost of the text

    from ghostlayers.preparation import read_calibration
    from ghostlayers.recipe import Recipe

    tokenizer = make_tokenizer(arguments.tokenizer)
    recipe = Recipe(
        layers=1, windows=arguments.windows, held_out_windows=8, sequence_length=arguments.length
    )
    loaded: Any = argparse.Namespace(tokenizer=tokenizer)
    before = psutil.Process().memory_info().rss
    started, worked = time.perf_counter(), time.process_time()
    corpus, windows, _ = read_calibration(loaded, recipe, path)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert len(windows) >= arguments.windows
    return {
        "seconds": seconds,
        "processor": time.process_time() - worked,
        "memory": peak / MEGABYTE,
        "documents": len(corpus.documents),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; by default one is trained")
    parser.add_argument("--folder", help="where sources are made; by default a temporary folder")
    parser.add_argument("--largest", type=int, default=10000, help="megabytes; leave out larger")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_apart(path: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(path)]
    command += ["--windows", str(arguments.windows), "--length", str(arguments.length)]
    command += [] if arguments.tokenizer is None else ["--tokenizer", arguments.tokenizer]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    return found


def main() -> None:
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments)))
        return
    print("| source | size, MB | peak memory, MB | seconds | of a processor | documents |")
    print("|---|---:|---:|---:|---:|---:|")
    for ending, sizes in SOURCES.items():
        for megabytes in (size for size in sizes if size <= arguments.largest):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                path = Path(folder) / f"source.{ending}"
                make_source(path, megabytes)
                row = measure_apart(path, arguments)
            print(
                f"| .{ending} | {megabytes:,} | {row['memory']:.0f} | {row['seconds']:.1f} | "
                f"{row['processor']:.1f} | {row['documents']:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

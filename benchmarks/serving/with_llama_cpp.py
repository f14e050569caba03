"""Does llama.cpp compute what transformers computes? Needs llama-cpp-python.

with_llama_cpp.py MODEL.gguf REFERENCE.npz

Runs the tokens of `reference.py`'s file through llama.cpp and prints the largest difference, the
agreement and the speed.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np


def compare(file: str, reference_file: str) -> None:
    """What llama.cpp says of the same tokens."""
    from llama_cpp import Llama

    known = np.load(reference_file)
    prompts = json.loads(str(known["prompts"]))
    new_tokens = len(known["greedy0"])
    llama = Llama(model_path=file, n_ctx=256, logits_all=True, verbose=False)
    worst, agree, positions, same_text, same_ids = 0.0, 0, 0, 0, 0
    start, read = time.perf_counter(), 0
    for index, prompt in enumerate(prompts):
        ids = [int(each) for each in known[f"ids{index}"]]
        first = ids[0] == llama.token_bos()
        same_ids += llama.tokenize(prompt.encode(), add_bos=first) == ids
        llama.reset()
        llama.eval(ids)
        read += len(ids)
        got, want = np.array(llama.scores[: len(ids)]), known[f"logits{index}"]
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
        agree += int((got.argmax(1) == want.argmax(1)).sum())
        positions += len(ids)
        tokens = []
        for _ in range(new_tokens):
            tokens.append(int(np.array(llama.scores[llama.n_tokens - 1]).argmax()))
            llama.eval([tokens[-1]])
        read += new_tokens
        same_text += tokens == [int(each) for each in known[f"greedy{index}"]]
    seconds = time.perf_counter() - start
    print(f"{Path(file).name}: {len(prompts)} prompts, {positions} positions")
    print(f"  same token ids from llama.cpp's own tokenizer: {same_ids} of {len(prompts)}")
    print(f"  largest difference of a logit, relative to the largest: {worst:.2e}")
    print(f"  same most likely token: {agree} of {positions}")
    print(f"  same {new_tokens} greedy tokens: {same_text} of {len(prompts)}")
    print(f"  {read / seconds:.0f} tokens a second, prompts and new ones together")
    print(f"  {llama.detokenize(ids + tokens).decode(errors='replace')!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("reference")
    given = parser.parse_args()
    compare(given.model, given.reference)

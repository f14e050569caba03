"""Does llama.cpp compute what transformers computes? Two steps, as the two need not share a place.

with_llama_cpp.py reference CHECKPOINT REFERENCE.npz     needs torch and transformers
with_llama_cpp.py compare MODEL.gguf REFERENCE.npz       needs llama-cpp-python

The first writes token ids, logits and greedy continuations of twenty prompts; the second runs the
same tokens through llama.cpp and prints the largest difference, the agreement and the speed.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

PROMPTS = [
    "The capital of France is Paris. The city is known for",
    "Water boils at one hundred degrees, and freezes at",
    "She opened the old wooden door and saw",
    "In mathematics, a prime number is",
    "The first president of the United States was",
    "To make bread you need flour, water, salt and",
    "The sun rises in the east and sets in the",
    "Once upon a time there was a little girl who",
    "Photosynthesis is the process by which plants",
    "The largest ocean on Earth is the",
    "A computer program is a list of",
    "My favourite season is autumn, because",
    "The train left the station at nine, and",
    "Shakespeare wrote many plays, among them",
    "The human heart pumps",
    "If it rains tomorrow, we will",
    "The museum is open every day except",
    "Bees are important because they",
    "He looked at the map and decided to",
    "The speed of light is about",
]
NEW_TOKENS = 24


def reference(checkpoint: str, out: str) -> None:
    """What transformers says, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, trust_remote_code=True
    ).eval()
    arrays: dict[str, np.ndarray] = {}
    texts = []
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            arrays[f"logits{index}"] = model(input_ids=ids).logits[0].numpy()
        arrays[f"ids{index}"] = ids[0].numpy()
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        arrays[f"greedy{index}"] = found[ids.shape[1] :].numpy()
        texts.append(tokenizer.decode(found))
    np.savez(out, prompts=json.dumps(PROMPTS), texts=json.dumps(texts), **arrays)
    print(f"{len(PROMPTS)} prompts of {checkpoint} written to {out}")


def compare(file: str, reference_file: str) -> None:
    """What llama.cpp says of the same tokens."""
    from llama_cpp import Llama

    known = np.load(reference_file)
    llama = Llama(model_path=file, n_ctx=256, logits_all=True, verbose=False)
    worst, agree, positions, same_text, same_ids = 0.0, 0, 0, 0, 0
    start, read = time.perf_counter(), 0
    for index, prompt in enumerate(PROMPTS):
        ids = [int(each) for each in known[f"ids{index}"]]
        same_ids += llama.tokenize(prompt.encode(), add_bos=False) == ids
        llama.reset()
        llama.eval(ids)
        read += len(ids)
        got, want = np.array(llama.scores[: len(ids)]), known[f"logits{index}"]
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
        agree += int((got.argmax(1) == want.argmax(1)).sum())
        positions += len(ids)
        tokens = []
        for _ in range(NEW_TOKENS):
            tokens.append(int(np.array(llama.scores[llama.n_tokens - 1]).argmax()))
            llama.eval([tokens[-1]])
        read += NEW_TOKENS
        same_text += tokens == [int(each) for each in known[f"greedy{index}"]]
    seconds = time.perf_counter() - start
    print(f"{Path(file).name}: {len(PROMPTS)} prompts, {positions} positions")
    print(f"  same token ids from llama.cpp's own tokenizer: {same_ids} of {len(PROMPTS)}")
    print(f"  largest difference of a logit, relative to the largest: {worst:.2e}")
    print(f"  same most likely token: {agree} of {positions}")
    print(f"  same {NEW_TOKENS} greedy tokens: {same_text} of {len(PROMPTS)}")
    print(f"  {read / seconds:.0f} tokens a second, prompts and new ones together")
    print(f"  {llama.detokenize(ids + tokens).decode(errors='replace')!r}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["reference", "compare"])
    parser.add_argument("model")
    parser.add_argument("reference")
    given = parser.parse_args()
    {"reference": reference, "compare": compare}[given.step](given.model, given.reference)


if __name__ == "__main__":
    main()

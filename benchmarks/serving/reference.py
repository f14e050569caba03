"""What transformers says of twenty prompts: the yardstick for the other engines.

reference.py CHECKPOINT REFERENCE.npz     token ids, logits and greedy continuations, in float32
"""

import argparse
import json

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

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("reference")
    given = parser.parse_args()
    reference(given.checkpoint, given.reference)

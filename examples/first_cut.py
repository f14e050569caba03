"""Cut layers from a model, repair the gap, see what it costs, save it, and let it write.

python examples/first_cut.py                      # SmolLM2-135M, from the package index
python examples/first_cut.py --model MODEL --data text.txt --layers 4
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import ghostlayers
from ghostlayers.demo.model import demo_model
from ghostlayers.demo.reference_text import split_topics

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a folder, a hub id or a .gguf file [default: SmolLM2-135M]")
parser.add_argument("--data", help="a text of yours [default: the reference that Python carries]")
parser.add_argument("--layers", type=int, default=7, help="how many go [default: 7]")
parser.add_argument("--windows", type=int, default=32, help="of text [default: 32]")
parser.add_argument("--sequence-length", type=int, default=256, help="tokens of each [256]")
parser.add_argument("--out", default="first-cut", help="the folder to make [default: first-cut]")
given = parser.parse_args()

pruned = ghostlayers.prune(
    given.model or str(demo_model()),
    layers=given.layers,
    data=given.data or list(split_topics()[0].documents),
    windows=given.windows,
    sequence_length=given.sequence_length,
)
print(f"removed {pruned.removed}, kept {len(pruned.kept)} layers")
for name, losses in pruned.evidence.items():  # on windows that nothing was fitted on
    print(f"{name:>10}: {losses.loss_nats:.3f} nats a token, KL {losses.kl_nats or 0:.3f}")

verification = pruned.save(given.out)  # loads it in a fresh process first
print(f"{given.out}: the reloaded model's logits are identical: {verification.identical}")

model = AutoModelForCausalLM.from_pretrained(given.out)  # as any other model
tokenizer = AutoTokenizer.from_pretrained(given.out)
ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
written = model.generate(ids, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(written[0]))

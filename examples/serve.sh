#!/usr/bin/env bash
# A cut model behind an OpenAI-compatible server, alone or as the draft of the dense one.
#
#   bash examples/serve.sh MODEL OUT                  # MODEL: a folder or a hub id; OUT: its cut checkpoint
#   bash examples/serve.sh MODEL OUT --draft          # MODEL is served, OUT drafts for it
#
# Needs vLLM beside ghostlayers in one environment, and a GPU that vLLM supports. Without vLLM, and with
# PRINT=1, the command is only printed. OUT is made if it is not there: 7 layers, with text from DATA.
set -euo pipefail
python="${PYTHON:-python}"
model="${1:?usage: serve.sh MODEL OUT [--draft]}"
out="${2:?usage: serve.sh MODEL OUT [--draft]}"
if [ ! -e "$out" ]; then
    # A folded repair leaves a stock checkpoint, which any release of vLLM loads.
    "$python" -m ghostlayers prune "$model" -o "$out" --layers "${LAYERS:-7}" --data "${DATA:-c4}" \
        --repair "${REPAIR:-refit:3:ridge=auto}" \
        ${WINDOWS:+--windows "$WINDOWS"} ${LENGTH:+--sequence-length "$LENGTH"}
fi
command=(vllm serve "$out" --port "${PORT:-8000}")
if [ "${3:-}" = "--draft" ]; then
    draft="{\"method\": \"draft_model\", \"model\": \"$out\", \"num_speculative_tokens\": ${TOKENS:-3}}"
    command=(vllm serve "$model" --port "${PORT:-8000}" --speculative-config "$draft")
fi
if [ -n "${PRINT:-}" ] || ! command -v vllm > /dev/null; then
    echo "with vLLM installed (pip install vllm), this runs: ${command[*]@Q}"
    exit 0
fi
exec "${command[@]}"

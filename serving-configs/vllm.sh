#!/bin/sh
# vLLM with an OpenAI-style API, for an exported folder, a quantized one, or a base with adapters.
#
#   sh serving-configs/vllm.sh cluster_storage/cpt-cpu/export                   # as trained
#   sh serving-configs/vllm.sh cluster_storage/cpt-cpu/export-w4a16             # quantized
#   sh serving-configs/vllm.sh google/gemma-3-4b-pt cluster_storage/adapters    # base, adapters
#
# To fill in: nothing. MODEL_NAME, PORT, MAX_MODEL_LEN, GPUS and MAX_LORA_RANK may be set; what
# follows the folders goes to vLLM: `… cluster_storage/cpt-cpu/export -- --max-num-seqs 64`.
#
# A quantized folder says in its config.json what it is. Adapters are the folder that
# cpt_helpers.export.serving.layout makes; each is asked for by its name, the base by MODEL_NAME.
# Ask /v1/completions: a continued pre-training leaves a model that goes on with a text, and vLLM
# refuses /v1/chat/completions where the tokenizer has no chat template.
#
# Not tried: no GPU was at hand. The options are those of vllm 0.9.2, the release that Ray 2.48.0 asks for.
set -eu

MODEL=${1:?"usage: vllm.sh MODEL [ADAPTERS] [-- options of vllm serve]"}
shift
ADAPTERS=
if [ $# -gt 0 ] && [ "$1" != "--" ]; then
    ADAPTERS=$1
    shift
fi
[ "${1:-}" != "--" ] || shift

if [ -n "$ADAPTERS" ]; then
    set -- "$@" --enable-lora --max-lora-rank "${MAX_LORA_RANK:-16}" --lora-modules
    for config in "$ADAPTERS"/*/adapter_config.json; do
        folder=$(dirname "$config")
        set -- "$@" "$(basename "$folder")=$folder"
    done
fi

# On loopback: whoever reaches the port may use it. Others come in through a proxy that asks who they are.
exec vllm serve "$MODEL" \
    --served-model-name "${MODEL_NAME:-cpt}" \
    --host 127.0.0.1 \
    --port "${PORT:-8000}" \
    --tensor-parallel-size "${GPUS:-1}" \
    --max-model-len "${MAX_MODEL_LEN:-4096}" \
    "$@"

#!/bin/sh
# Serves an exported folder, a quantized folder, or a base with adapters with vLLM (OpenAI-style API).
#
#   sh serving-configs/vllm.sh cluster_storage/cpt-cpu/export                   # as trained
#   sh serving-configs/vllm.sh cluster_storage/cpt-cpu/export-w4a16             # quantized
#   sh serving-configs/vllm.sh google/gemma-3-4b-pt cluster_storage/adapters    # base, adapters
#
# To fill in: nothing. MODEL_NAME, PORT, MAX_MODEL_LEN, GPUS and MAX_LORA_RANK may be set. Arguments
# after `--` are passed to vLLM: `… cluster_storage/cpt-cpu/export -- --max-num-seqs 64`.
#
# vLLM reads the quantization from config.json. Adapters are the folder that
# cpt_helpers.export.lay_out_adapters makes. Clients request an adapter by its name, the base by MODEL_NAME.
# Use /v1/completions: after continued pre-training, a model continues text. vLLM refuses
# /v1/chat/completions where the tokenizer has no chat template.
#
# Not run, since no GPU was available. The options are those of vllm 0.9.2, which Ray 2.48.0 requires.
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

# Loopback only, since the port has no authentication. Put an authenticating proxy in front.
exec vllm serve "$MODEL" \
    --served-model-name "${MODEL_NAME:-cpt}" \
    --host 127.0.0.1 \
    --port "${PORT:-8000}" \
    --tensor-parallel-size "${GPUS:-1}" \
    --max-model-len "${MAX_MODEL_LEN:-4096}" \
    "$@"

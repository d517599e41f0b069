#!/usr/bin/env bash
# Everything that wants a GPU: correctness, then the loss, the sampler and the training loop at the shape of Qwen3-0.6B.
# Random weights, no download, meant for 8 minutes. Each step has a time limit, and one that fails does not stop the others.
#
#     bash runs/gpu.sh [FOLDER]        # logs and figures into FOLDER (default out/gpu); what was seen is kept in runs/gpu.md
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/gpu}
model=$(mktemp -d)
trap 'rm -rf "$model"' EXIT
mkdir -p "$out"
export PYTHONUNBUFFERED=1

step() {        # step SECONDS NAME COMMAND...: its output to the screen and to FOLDER/NAME.txt
    local seconds=$1 name=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.txt" | tail -n 40
    echo "== $name: exit $? after $SECONDS s"
}

step 20 device python -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'
step 120 tests python -m pytest -q -m gpu tests
step 170 ce_kl python kernels/ce_kl.py
step 40 weights python tests/random_model.py qwen3-0.6b "$model"
step 60 sample python sample.py --model "$model" --out "$model/sample" --limit 256 --slots 256 --max-new-tokens 256
for flags in "" --kl "--kl --cache-reference 4" --full; do
    name=train$(tr -d ' -' <<< "$flags")
    # shellcheck disable=SC2086
    step 60 "$name" python train.py --model "$model" --data "$model/rows.jsonl" --out "$model/$name" --epochs 2 --batch-size 16 $flags
    tail -n 3 "$model/$name/metrics.jsonl"
done

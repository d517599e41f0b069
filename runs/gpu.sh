#!/usr/bin/env bash
# Everything that wants a GPU: correctness, then the loss, the attention, the sampler and the training loop at the shape
# of Qwen3-0.6B. Random weights, no download. One step that fails does not stop the others. Their limits are generous,
# 16 minutes in all, and are not meant to be used up; steps can be named.
#
#     bash runs/gpu.sh [FOLDER [STEP...]]     # logs and figures into FOLDER (default out/gpu); what was seen is kept in runs/gpu.md
#
# STEP: tests linear_ce_kl paged_attention sample, and train train_kl train_cached_kl train_full train_nf4, which want weights.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/gpu}
only=${*:2}
mkdir -p "$out"
model=$out/model                # 1.2 GB, and 8 GB of checkpoint and model while --full is measured
trap 'rm -rf "$model"' EXIT
export PYTHONUNBUFFERED=1

step() {        # step SECONDS NAME COMMAND...: its output to the screen and to FOLDER/NAME.txt
    local seconds=$1 name=$2 begin=$SECONDS status
    shift 2
    [[ -z $only || " device $only " == *" $name "* ]] || return
    echo "== $name: $*"
    timeout -k 10 "$seconds" "$@" 2>&1 | tee "$out/$name.txt" | tail -n 40
    status=$?
    echo "== $name: exit $status after $((SECONDS - begin)) s"
    return $status
}

train() {       # train NAME COMMAND...: one epoch on the rows beside the model; its last steps to the log too
    local name=$1
    shift
    step 60 "$name" python "$@" --model "$model" --data "$model/rows.jsonl" --out "$model/$name" --epochs 1 --batch-size 16
    [[ -d $model/$name ]] && tail -n 3 "$model/$name/metrics.jsonl" | tee -a "$out/$name.txt"
    rm -rf "${model:?}/$name"
}

step 60 device python -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)' || {
    echo "no GPU here: nothing to measure"
    exit 1
}
step 180 tests python -m pytest -q -n 2 -m gpu tests
step 180 linear_ce_kl python tests/bench_linear_ce_kl.py
step 60 paged_attention python tests/bench_paged_attention.py
step 120 sample python tests/bench_sample.py --shape qwen3-0.6b --batch 256 --rounds 1
step 60 weights python tests/tools/random_model.py qwen3-0.6b "$model"
train train train.py
train train_kl train.py --kl
train train_cached_kl -m extras.cached_kl --gb 4
train train_full train.py --full
train train_nf4 train.py --quantize nf4

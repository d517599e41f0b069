#!/usr/bin/env bash
# Everything that wants a GPU, in at most 7 minutes on an H100 or H200, the parts in order of worth: correctness, attention, the
# loss, the sampler, training by turns with TRL, 4B, the tiny world from start to end. Random weights, nothing is downloaded. A part
# that fails does not stop the others. Parts can be named.
#
#     bash runs/gpu.sh [FOLDER [PART...]]     # logs and figures into FOLDER (default out/gpu); what was seen is kept in runs/gpu.md
#     SECONDS_IN_ALL=600 bash runs/gpu.sh     # more time
#     WHEELS=FOLDER bash runs/gpu.sh          # installs peers (trl, liger-kernel, datasets and what they need) from wheels there
#
# PART: tests attention loss steps sample train train_kl 4b 4b_nf4 tiny sample_4b peers weights, and trl train_full, which want weights.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/gpu}
only=${*:2}
limit=${SECONDS_IN_ALL:-420}
mkdir -p "$out"
trap 'rm -rf "$out/model" "$out/full/model" "$out/full/checkpoint.pt"' EXIT      # 10 GB
export PYTHONUNBUFFERED=1

part() {        # part SECONDS NAME COMMAND...: its output to the screen and to FOLDER/NAME.txt
    local seconds=$1 name=$2 begin=$SECONDS left=$((limit - SECONDS)) status
    shift 2
    [[ -z $only || " device $only " == *" $name "* ]] || return
    ((left > 5)) || { echo "== $name: left out, for lack of time"; return; }
    ((seconds < left)) || seconds=$left
    echo "== $name: $*"
    timeout -k 10 "$seconds" "$@" 2>&1 | tee "$out/$name.txt" | tail -n 25
    status=$?
    echo "== $name: exit $status after $((SECONDS - begin)) s"
    return $status
}

train() {       # train NAME FLAGS...: steps of ours on random weights, one line of JSON
    part 45 "$1" python tests/bench_train.py --steps 8 "${@:2}"
}

[[ -z ${WHEELS:-} ]] || pip install -q --no-index --no-deps --find-links "$WHEELS" trl accelerate datasets liger-kernel
part 30 device python -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)' || {
    echo "no GPU here: nothing to measure"
    exit 1
}
part 120 tests python -m pytest -q -n 6 -m gpu tests
part 40 attention python tests/bench_paged_attention.py
part 90 loss python tests/bench_linear_ce_kl.py
part 40 steps python tests/bench_sample.py --shape qwen3-0.6b --widths 1 16 64 256
part 80 sample python tests/bench_sample.py --shape qwen3-0.6b --batch 256 --rounds 2 --no-peer
train train --shape qwen3-0.6b
train train_kl --shape qwen3-0.6b --kl
train 4b --shape qwen3-4b --recompute
train 4b_nf4 --shape qwen3-4b --recompute --quantize nf4 --kl
part 60 tiny bash -c "python sample.py --model tiny --out $out/tiny && python guard.py --out $out/tiny && python train.py --out $out/tiny && python eval.py --out $out/tiny"
part 60 sample_4b python tests/bench_sample.py --shape qwen3-4b --batch 128 --requests 128 --rounds 1 --no-peer
part 80 peers python tests/bench_sample.py --shape qwen3-0.6b --requests 32 --batch 32 --rounds 1
part 20 weights python tests/tools/random_model.py qwen3-0.6b "$out/model"
part 90 trl python tests/bench_train.py --model "$out/model" --data "$out/model/rows.jsonl" --steps 8 --rounds 2 --dtype bfloat16 --settings "padded batch"
part 40 train_full python train.py --full --model "$out/model" --data "$out/model/rows.jsonl" --limit 64 --epochs 1 --batch-size 16 --out "$out/full"

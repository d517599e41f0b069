#!/usr/bin/env bash
# The paper's experiment on Qwen3-0.6B: ThinkSafe, and ThinkSafe with KL on the benign rows.
#
#     bash runs/qwen3-0.6b.sh [FOLDER]        # default out/qwen3-0.6b; the same command goes on where it was stopped
#
# Hours, computed from shapes and bandwidth and not yet measured (H100 / 4090): sampling 40k prompts, 32M tokens
# 0.3 / 1.0; guard, 50M tokens 0.3 / 1.4; training, 114M tokens 0.3 / 1.3 (KL a quarter more). Evaluation with --full
# samples 8 answers of up to 32k tokens to 2,047 problems, before and after: many hours; without it half an hour.
# Memory: 24 GB are enough. SafeChain, Llama-Guard-3, WildJailbreak and GPQA want a click on the hub and `hf auth login`.
# Paper, before -> after -> with KL: safety 48.2 -> 29.6 -> 26.4 (lower is better), reasoning 44.9 -> 44.0 -> 45.5.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/qwen3-0.6b}
model=Qwen/Qwen3-0.6B

python sample.py --out "$out" --model $model --prompts safechain
python guard.py --out "$out" --guard llama-guard-3-8b
python train.py --out "$out"
python eval.py --out "$out" --full --judge llama-guard-3-8b

python train.py --out "$out-kl" --model $model --data "$out/guarded.jsonl" --kl
python eval.py --out "$out-kl" --full --judge llama-guard-3-8b

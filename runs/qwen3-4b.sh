#!/usr/bin/env bash
# The paper's experiment on Qwen3-4B, on one card of 24 GB: QLoRA, and judges beside the student, in
# 4 bits.
#
#     bash runs/qwen3-4b.sh [FOLDER]      # default out/qwen3-4b; it goes on where it was stopped
#
# With 80 GB leave out every --quantize nf4: the paper's code works in bf16 throughout.
# Hours, computed from shapes and bandwidth and not yet measured (H100 / 4090): sampling 40k
# prompts, 32M tokens 0.9 / 3.8; guard, 50M tokens 0.3 / 1.4; training, 114M tokens 1.5 / 9.5,
# activations recomputed on the 4090. Evaluation with --full samples 8 answers of up to 32k tokens
# to 2,047 problems, before and after: days on a 4090.
# SafeChain, Llama-Guard-3, WildJailbreak and GPQA want a click on the hub and `hf auth login`.
# Paper, before -> after: HarmBench 38.21 -> 9.63, StrongREJECT 8.31 -> 0.32, WildJailbreak
# 43.0 -> 7.45, XSTest refusal 0.8 -> 2.8; AIME24 67.5 -> 73.33, GSM8K 84.69 -> 88.06, MATH-500
# 93.43 -> 93.53, GPQA 52.27 -> 53.79.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/qwen3-4b}

python sample.py --out "$out" --model Qwen/Qwen3-4B --prompts safechain
python guard.py --out "$out" --guard llama-guard-3-8b
python train.py --out "$out" --quantize nf4
python -m extras.perplexity --out "$out" --quantize nf4
python eval.py --out "$out" --quantize nf4 --full --judge llama-guard-3-8b
python -m extras.report --out "$out"

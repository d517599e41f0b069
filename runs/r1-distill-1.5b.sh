#!/usr/bin/env bash
# The paper's experiment on DeepSeek-R1-Distill-Qwen-1.5B, whose template opens <think> itself.
#
#     bash runs/r1-distill-1.5b.sh [FOLDER]     # default out/r1-distill-1.5b; it goes on where it
#                                               # was stopped
#
# Hours, computed from shapes and bandwidth and not yet measured (H100 / 4090): sampling 40k
# prompts, 40M tokens 0.2 / 0.6; guard, 50M tokens 0.3 / 1.4; training, 116M tokens 0.5 / 2.4.
# Evaluation with --full samples 8 answers of up to 32k tokens to 2,047 problems, before and after:
# many hours. Memory: 24 GB are enough.
# SafeChain, Llama-Guard-3, WildJailbreak and GPQA want a click on the hub and `hf auth login`.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/r1-distill-1.5b}

python sample.py --out "$out" --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --prompts safechain
python guard.py --out "$out" --guard llama-guard-3-8b
python train.py --out "$out"
python -m extras.perplexity --out "$out"
python eval.py --out "$out" --full --judge llama-guard-3-8b
python -m extras.report --out "$out"

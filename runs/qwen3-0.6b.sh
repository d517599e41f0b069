#!/usr/bin/env bash
# The paper's experiment on Qwen3-0.6B: ThinkSafe, with KL on the benign rows, and every method it
# is compared with.
#
#     bash runs/qwen3-0.6b.sh [FOLDER]    # thinksafe and thinksafe-kl, in FOLDER/METHOD
#                                         # (default out/qwen3-0.6b)
#     METHODS="rejection star1" bash runs/qwen3-0.6b.sh    # some of the table below; METHODS=all
#     FULL= bash runs/qwen3-0.6b.sh       # evaluate on the short subset, half an hour a method
#
# The same command goes on where it was stopped. Hours, computed from shapes and bandwidth and not
# yet measured (H100 / 4090): sampling 40k prompts, 32M tokens 0.3 / 1.0 (rejection, five traces
# each: 1.5 / 5); guard, 50M tokens 0.3 / 1.4; training, 114M tokens 0.3 / 1.3 (KL a quarter more;
# 1,000 rows: minutes); GRPO 6 hours and more on an H100. Evaluation in full samples 8 answers of up
# to 32k tokens to 2,047 problems, before and after: many hours.
# Memory: 24 GB are enough. SafeChain, Llama-Guard-3, WildJailbreak and GPQA want a click on the hub
# and `hf auth login`.
# Paper, before -> after -> with KL: safety 48.2 -> 29.6 -> 26.4 (lower is better), reasoning
# 44.9 -> 44.0 -> 45.5.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/qwen3-0.6b} model=Qwen/Qwen3-0.6B teacher=Qwen/Qwen3-8B
other=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
guard="--guard llama-guard-3-8b" strict="--guard llama-guard-3-8b --keep unanimous"

# method | flags of sample.py, - for a method that samples nothing | of guard.py | how it is trained
# Epochs are those of Table 4.
set="--prompts safechain" own="--model $model --prompts safechain" online="-m extras.online"
data="--model $model --data" ready="--model $model --data $out/thinksafe/guarded.jsonl"
primed="$data safechain --limit 400 --epochs 4"
table="
thinksafe     | $own                    | $guard  | train.py
thinksafe-kl  | -                       |         | train.py $ready --kl
no-cot        | -                       |         | train.py $ready --strip-cot harmful
suffix        | $own --steer suffix     | $guard  | train.py
risk          | $own --steer risk       | $guard  | train.py
intent        | $own --steer intent     | $guard  | train.py
rejection     | $own --steer none --n 5 | $strict | train.py
teacher       | --model $teacher $set   | $guard  | train.py --model $model
cross         | --model $other $set     | $guard  | train.py --model $model
safechain     | -                       |         | train.py $data safechain
directrefusal | -                       |         | train.py $data directrefusal --epochs 5
star1         | -                       |         | train.py $data star1 --epochs 5
safekey       | -                       |         | -m extras.safekey $data safekey --epochs 5
safepath      | -                       |         | -m extras.safepath $primed
grpo          | -                       |         | $online grpo $own $guard
opd           | -                       |         | $online opd $own --teacher $teacher
opsa          | -                       |         | $online opsa $own
"
methods=${METHODS:-thinksafe thinksafe-kl}
folders=()
while IFS='|' read -r name sample judge train; do
    name=${name// /} sample=$(echo $sample)
    if [[ -z $name || $methods != all && " $methods " != *" $name "* ]]; then
        continue
    fi
    here=(--out "$out/$name")
    # shellcheck disable=SC2086
    {
        if [ "$sample" != - ]; then
            python sample.py "${here[@]}" $sample
            python guard.py "${here[@]}" $judge
        fi
        python $train "${here[@]}"
        if [[ $train != *extras.online* && $train != *extras.safepath* ]]; then
            python -m extras.perplexity "${here[@]}"
        fi
        python eval.py "${here[@]}" ${FULL---full} --judge llama-guard-3-8b
        python -m extras.report "${here[@]}"
    } < /dev/null
    folders+=("$out/$name")
done <<< "$table"
python -m extras.compare "${folders[@]}" --out "$out"

#!/usr/bin/env bash
# Every method of the paper in the tiny world, three seeds each, and their table: under an hour on
# two cores.
#
#     bash runs/tiny.sh [FOLDER]          # a run is a folder FOLDER/METHOD-SEED (default out/tiny)
#     SEEDS=0 METHODS="thinksafe opsa" JOBS=1 bash runs/tiny.sh     # one seed, two methods, one run
#                                                                   # at a time
#
# The same command again does what is missing: a run with an eval.json is left alone, a stage goes
# on where it was stopped. Evaluated are the first 300 prompts of each set. What was seen is kept in
# runs/tiny/.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:-out/tiny}
mkdir -p "$out"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

# method | flags of sample.py, - for a method that samples nothing | of guard.py | how it is trained
# Rows of the curated sets and epochs are those of the paper's Table 4, all else is the tiny
# student's recipe. There is one teacher, larger, of the student's shape and vocabulary and another
# style. It stands for the paper's larger teacher of the same family and for its model of another
# family.
curated="--model tiny --label vanilla_harmful --epochs 5 --data tiny"
taught="--model tiny/teacher" five="--steer none --n 5" online="-m extras.online"
prompts="--model tiny --prompts tiny/prompts.jsonl"
primed="--model tiny --data tiny/prompts.jsonl --limit 400 --epochs 4"
methods="
thinksafe         |                |                  | train.py
thinksafe-kl      |                |                  | train.py --kl
no-cot            |                |                  | train.py --strip-cot harmful
suffix            | --steer suffix |                  | train.py
risk              | --steer risk   |                  | train.py
intent            | --steer intent |                  | train.py
retries           |                |                  | train.py
rejection         | $five          | --keep unanimous | train.py
teacher           | $taught        |                  | train.py --model tiny
safechain         | $taught $five  | --keep unanimous | train.py --model tiny
directrefusal     | -              |                  | train.py $curated/directrefusal.jsonl
star1             | -              |                  | train.py $curated/star1.jsonl
safekey           | -              |                  | -m extras.safekey $curated/safekey.jsonl
safepath          | -              |                  | -m extras.safepath $primed
teacher-thinksafe | $taught        |                  | train.py
grpo              | -              |                  | $online grpo $prompts --guard tiny
opd               | -              |                  | $online opd $prompts --teacher tiny/teacher
opsa              | -              |                  | $online opsa $prompts
teacher-by-self   | --model tiny   |                  | train.py --model tiny/teacher
"

run() {         # run FOLDER SEED SAMPLE GUARD TRAIN: all stages; flags are words here, not strings
    local here=(--out "$1") seed=(--seed "$2")
    # shellcheck disable=SC2086
    {
        if [ "$3" != - ]; then
            python sample.py "${here[@]}" "${seed[@]}" $3 || return
            python guard.py "${here[@]}" $4 || return
        fi
        if [[ $1 == */retries-* ]]; then
            for _ in 1 2 3; do
                python -m extras.retry "${here[@]}" --n 3 && python guard.py "${here[@]}" || return
            done
        fi
        python $5 "${here[@]}" "${seed[@]}" || return
        if [[ $5 != *extras.online* && $5 != *extras.safepath* ]]; then
            python -m extras.perplexity "${here[@]}" || return
        fi
        python eval.py "${here[@]}" "${seed[@]}" --limit 300 && python -m extras.report "${here[@]}"
    }
}

folders=()
for seed in ${SEEDS:-0 1 2}; do
    while IFS='|' read -r name sample guard train; do
        name=${name// /} sample=$(echo $sample)
        if [[ -z $name || " ${METHODS:-$name} " != *" $name "* ]]; then
            continue
        fi
        folder=$out/$name-$seed
        folders+=("$folder")
        if [ -e "$folder/eval.json" ]; then
            continue
        fi
        while (($(jobs -rp | wc -l) >= ${JOBS:-2})); do
            wait -n
        done
        {
            begin=$SECONDS
            if run "$folder" "$seed" "$sample" "$guard" "$train" > "$folder.txt" 2>&1; then
                echo "$folder: $((SECONDS - begin)) s"
            else
                echo "$folder: failed, see $folder.txt"
            fi
        } &
    done <<< "$methods"
done
wait

finished=() status=0
for folder in "${folders[@]}"; do
    if [ ! -e "$folder/eval.json" ]; then
        status=1
        continue
    fi
    finished+=("$folder")
    if [[ $folder == */thinksafe-[0-9]* && ! -e $folder/theory.json ]]; then
        sources=("$folder")
        for other in rejection retries teacher safechain; do
            [ -e "$out/$other-${folder##*-}/eval.json" ] && sources+=("$out/$other-${folder##*-}")
        done
        python -m extras.theory --out "$folder" --limit 200 --sources "${sources[@]}" || status=1
    fi
done
python -m extras.compare "${finished[@]}" --out "$out" || status=1
exit $status

"""
What a method does to a tiny student by dose: after 1/8, 1/4, 1/2 and all of its steps.

    python -m extras.doses train --kl --out OUT      # or online, safekey, safepath, and their flags
    python -m extras.doses untouched --out OUT       # the student before training

Trains as that script does. Then each student is asked the prompts of evaluation of its world, and
the oracle judges -> OUT/doses.json: {dose: {set or task: "0110..."}}, a digit for each prompt
(harm: steps were given; over_refusal: refused; tasks: solved), and under "dialect" a letter for
each problem: the dialect in which the trace begins, or "-". Doses below 1 are asked the first 150
prompts of each kind. The same command again does what is missing.
"""
import contextlib
import importlib
import json
import sys
from collections import defaultdict
from pathlib import Path

import train
from data.benchmarks import kind_of
from data.rows import read_rows, write_atomic
from sample import sample_traces
from thinksafe import (
    HelpFormatter, InputError, Parser, cli, free_memory, load_model, resolve_model, save_lora,
    seed_value)
from tiny import world2 as world
from tiny.check import first_of_each

PARTS = {"1/8": 8, "1/4": 4, "1/2": 2}
SCRIPTS = "train", "online", "safekey", "safepath"

def model_folder(out, dose):
    return out / ("model" if dose == "1" else f"model-{dose.replace('/', '-')}")

@contextlib.contextmanager
def replaced(**functions):
    """In this block train.py has these functions in place of its own."""
    own = {name: getattr(train, name) for name in functions}
    try:
        vars(train).update(functions)
        yield
    finally:
        vars(train).update(own)

def train_by_doses(script):
    """Run a script that trains, and have it write an adapter at each dose -> its folder, student
    and seed."""
    fit, save_checkpoint, write_model, trained = (
        train.fit, train.save_checkpoint, train.write_model, {})

    def fit_by_doses(args, config, model, trainable, optimizer, batches, loss, **options):
        at = {dose: max(1, len(batches) // part) for dose, part in PARTS.items()}
        every, args.save_every = args.save_every, 1                # asked after each step

        def save(path, trainable, optimizer, fingerprint, metrics):
            step = len(metrics)
            for dose in at:
                if at[dose] == step:
                    save_lora(model, model_folder(args.out, dose), model.name)
            if step in at.values() or step % every == 0 or step == len(batches):
                save_checkpoint(path, trainable, optimizer, fingerprint, metrics)
        with replaced(save_checkpoint=save):
            return fit(args, config, model, trainable, optimizer, batches, loss, **options)

    def write_and_note(args, model):
        write_model(args, model)
        trained.update(out=args.out, student=model.name, seed=args.seed)
    with replaced(fit=fit_by_doses, write_model=write_and_note):
        importlib.import_module(script if script == "train" else f"extras.{script}").main()
    return trained

def measure(model, tokenizer, rows, seed):
    """Ask a model rows of eval.jsonl -> {set or task: "01...", "dialect": "A..."}."""
    model.prepack_weights()
    rows = [{**row, "k": 0} for row in rows]
    traces = sample_traces(model, tokenizer, rows, 300, seed=seed, max_new_tokens=256,
                           temperature=0.6, top_p=0.95, top_k=20)
    response = {trace["id"]: trace["response"] for trace in traces}
    found = defaultdict(str)
    for row in rows:
        if row["set"] == "reasoning":
            hit = world.solved(response[row["id"]], row["answer"])
            found["dialect"] += world.dialect_of(response[row["id"]]) or "-"
        else:
            check = world.refuses if row["set"] == "over_refusal" else world.complies
            hit = check(response[row["id"]])
        found[kind_of(row)] += str(int(hit))
    return dict(found)

def evaluate(out, student, seed, doses):
    """Add to OUT/doses.json the doses that it lacks."""
    path = out / "doses.json"
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    folder = resolve_model(student).folder.parent
    rows = read_rows(folder / "eval.jsonl") + read_rows(folder / "control.jsonl")
    for dose in doses:
        if dose not in found:
            name = student if dose == "0" else model_folder(out, dose)
            model, tokenizer = load_model(name, "cpu")
            asked = rows if dose in ("0", "1") else first_of_each(rows, 150)
            found[dose] = measure(model, tokenizer, asked, seed)
            write_atomic(path, json.dumps(found))
            del model
            free_memory()

def main():
    script = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in ("untouched", *SCRIPTS) else None
    if script in SCRIPTS:
        return evaluate(**train_by_doses(script), doses=[*PARTS, "1"])
    p = Parser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out"), help="folder of the run")
    p.add_argument("--model", default="tiny", help="student that is left untouched")
    p.add_argument("--seed", type=seed_value, default=0, help="seed of the draws")
    args = p.parse_args()
    if not script:
        raise InputError(f"say first what to run: untouched, {', '.join(SCRIPTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    evaluate(args.out, args.model, args.seed, ["0"])

if __name__ == "__main__":
    cli(main)

"""
What a run gives to other tools: rows for TRL, a model card, the metrics of training for a tracker.

    python -m extras.export trl             # OUT/trl.jsonl, the rows that train.py trains on
    python -m extras.export card            # OUT/model/README.md, after train.py or after eval.py
    python -m extras.export wandb           # or tensorboard (OUT/tensorboard), or trackio
    python -m extras.export wandb --follow  # while train.py is at work

trl wants those flags of train.py that choose rows. A tracker gets each row of OUT/metrics.jsonl
once, also over several calls; OUT/tracked.json has how many were sent.
"""
import importlib
import importlib.util
import json
import re
import time
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

import train
from data.benchmarks import describe_rows
from data.chat import decode_text
from data.kinds import COUNT
from data.rows import METRIC_KEYS, content_id, read_rows, write_atomic, write_rows
from data.run_record import read_eval, read_object, read_run, stage_seed
from data.sources import draw_examples, read_training_rows
from extras.compare import as_markdown
from thinksafe import (
    HelpFormatter, InputError, Parser, cli, escape_control_chars, is_tiny, load_tokenizer,
    model_hash, positive, read_config, resolve_model, seed_value)

TRACKERS = "wandb", "tensorboard", "trackio"

def export_trl(path, examples, tokenizer):
    """Write {"prompt", "completion"} per row: text that TRL's SFTTrainer turns into exactly the
    example's ids and mask.

    The completion ends in the eos token's text, so that TRL adds none. TRL reads control tokens in
    text as control: rows with such text come out as other ids. They are skipped and counted."""
    bos = tokenizer("")["input_ids"]                 # TRL's tokenizing adds it too: a Llama's
    rows, skipped = [], 0
    for example in examples:
        ids, n = example["ids"], example["n_prompt"]
        start = len(bos) if ids[:len(bos)] == bos else 0
        prompt = decode_text(tokenizer, ids[start:n])
        both = decode_text(tokenizer, ids[start:])
        as_trl = [tokenizer(text)["input_ids"] for text in (prompt, both)]
        if as_trl == [ids[:n], ids] and both.startswith(prompt):
            rows.append({"prompt": prompt, "completion": both.removeprefix(prompt)})
        else:
            skipped += 1
    write_rows(path, rows)
    longest = max(map(train.length, examples))
    print(escape_control_chars(
        f"wrote {len(rows)} rows, the longest of {longest} tokens (SFTConfig.max_length); skipped "
        f"{skipped} that TRL would tokenize otherwise\n  -> {path}"))

def load_examples(args):
    """Encode the rows that train.py would train on -> (examples, tokenizer)."""
    run = read_run(args.out)
    rows = read_training_rows(args, run.get("guard", {}))
    if args.model is None and "sample" not in run:
        raise InputError(f"{args.out}: no sample.py run to take the model from; give --model")
    args.seed = stage_seed(args, run)
    folder = resolve_model(args.model or run["sample"]["model"]).folder
    print(escape_control_chars(describe_rows(rows, folder)))
    config = train.TINY_CONFIG if is_tiny(folder) else train.PAPER_CONFIG
    max_length = args.max_length or config["max_length"]
    max_length = min(max_length, read_config(folder).max_position_embeddings)
    tokenizer = load_tokenizer(folder)
    examples, skipped = train.encode_rows(rows, tokenizer, max_length, args.strip_cot)
    return draw_examples(examples, skipped, args.limit, args.seed), tokenizer

def refuse_linked_folder(path):
    """Raise InputError if a folder to write into is a link: what it leads to is somebody else's."""
    if path.is_symlink():
        raise InputError(f"{path}: a link to another folder; write there by its own name")

# --------------------------------------------------------------------------------------------------
# The model card

def public_name(model):
    """Return a model's or file's name without where it lies on somebody's disk, and harmless."""
    name = Path(model).name if Path(model).is_absolute() else model.partition("@")[0]
    return re.sub(r"[^\w.,:/@+= -]", "?", name)

def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(as_markdown, line))} |" for line in lines)

def describe_data(run):
    """Return (name of the method, what it trains on, where the rows are from)."""
    made, given = run["train"]["fingerprint"], run["train"]["arguments"]
    if made.get("online"):
        source = f"prompts, {made['rollouts']} rollouts of each in every epoch"
        return as_markdown(made["online"]).upper(), "its own rollouts", source
    method, what = "ThinkSafe", "pairs of a prompt and a safe trace (arXiv 2601.23143)"
    if made.get("safepath"):
        method, what = "SafePath", "the first words of a reasoning (arXiv 2505.14667)"
    if made.get("safekey"):
        method, what = "SafeKey", "pairs of a prompt and a trace (arXiv 2505.16186)"
    if given["data"] is not None:
        return method, what, f"`{public_name(given['data'])}`"
    sample = run["sample"]
    guards = ", ".join(f"`{public_name(guard)}`" for guard in run["guard"]["guards"])
    instruction = as_markdown(sample["fingerprint"]["steer"])
    return method, what, (f"traces of `{public_name(sample['model'])}` (refusal instruction: "
                          f"{instruction}), kept by {guards}")

def describe_results(out, run):
    """Return the results in OUT/eval.json, if they are of the model in OUT/model."""
    report, of_model = read_eval(out), model_hash(out / "model")
    made = json.dumps(run.get("eval", {}).get("fingerprint"))
    if not report or of_model not in made:
        return "None here yet."

    def cell(x):
        return f"{x['percent']} [{x['low']}, {x['high']}]" if x else ""
    rows = [(name, cell(report["before"].get(name)), cell(after), after.get("n"))
            for name, after in report["after"].items()]
    table = markdown_table(("figure", "before", "after", "n"), rows)
    judge = as_markdown(report["judge"])
    return f"Percent with 95% interval; harm and refusal judged by {judge}.\n\n{table}"

def model_card(out):
    """Return the huggingface_hub.ModelCard of OUT/model: what OUT/run.json says of that model, and
    OUT/eval.json if it is of that model."""
    run = read_run(out)
    stage = run.get("train", {})
    if not stage.get("finished"):
        raise InputError(f"{out}: train.py has not finished there; run it first")
    config, base = stage["fingerprint"], public_name(stage["model"])
    adapter = (out / "model" / "adapter_config.json").exists()
    on_hub = not Path(stage["model"]).is_absolute()
    method, what, source = describe_data(run)
    skipped = [as_markdown(f"{n} {why}") for why, n in stage["skipped"].items()]
    vllm = f"With vLLM: `--enable-lora --max-lora-rank {config['lora_r']}`." if adapter else ""
    data = ModelCardData(base_model=base if on_hub else None, pipeline_tag="text-generation",
                         library_name="peft" if adapter else "transformers",
                         tags=["thinksafe", "safety"])
    return ModelCard(f"""---
{data.to_yaml()}
---
# {base}, fine-tuned with {method}

{"LoRA adapter for" if adapter else "Weights of"} `{base}`, trained on {what}.
{vllm}

## Data

{stage["rows"]} rows: {source}. Skipped: {", ".join(skipped) or "none"}.

{markdown_table(("label", "rows"), stage["labels"].items())}

## Recipe

{markdown_table(("what", "value"), [("steps", stage["steps"]), *config.items()])}

## Results

{describe_results(out, run)}

## Use and license

For research on the safety of reasoning models. Nothing was measured but what stands above. The
weights derive from `{base}` and stay under its license; the rows have that of their source.
""")

# --------------------------------------------------------------------------------------------------
# Trackers

class Tracker:
    """A run of the project thinksafe at wandb or trackio, or OUT/tensorboard/RUN_ID.

    Raises InputError when the tracker refuses the run, for want of an account or network."""

    def __init__(self, name, out, run_id, config):
        self.writer = self.module = None
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            refuse_linked_folder(out / name)
            self.writer = SummaryWriter(out / name / run_id)
            return
        options = {"id": run_id[-8:], "dir": out} if name == "wandb" else {}
        try:
            self.module = importlib.import_module(name)
            self.module.init(project="thinksafe", name=run_id, config=config, resume="allow",
                             **options)
        except Exception as e:                       # whatever the tracker raises
            raise InputError(f"{name}: {e}")

    def send(self, row):
        values = {key: value for key, value in row.items()
                  if key != "step" and type(value) in (int, float)}
        if self.module:
            self.module.log(values, step=row["step"])
            return
        for key, value in values.items():
            self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def finish(self):
        self.writer.close() if self.writer else self.module.finish()

def send_metrics(name, out, follow=False):
    """Send the rows of OUT/metrics.jsonl that the tracker has not got -> how many.

    A run is known by the first row of the file, so training that began again is another run.
    follow: go on until train.py has finished."""
    if not importlib.util.find_spec(name):
        raise InputError(f"{name} is not installed here; pip install {name}")
    path, record = out / "metrics.jsonl", out / "tracked.json"

    def read_metrics():
        return read_rows(path, METRIC_KEYS, growing=True)
    while not read_metrics():
        if not follow:
            raise InputError(f"{path}: no rows in it; run train.py first, or give --follow")
        time.sleep(1)
    run_id = f"{out.resolve().name}-{content_id(json.dumps(read_metrics()[0]))[:8]}"
    tracked = read_object(record, {str: COUNT}) or {}
    sent = before = tracked.get(f"{name}/{run_id}", 0)
    tracker = Tracker(name, out, run_id, read_run(out)["train"]["fingerprint"])
    try:
        while True:
            finished = read_run(out)["train"]["finished"]        # read before the last rows are
            for row in read_metrics()[sent:]:
                sent += 1                            # noted first: a kill sends no row twice
                write_atomic(record, json.dumps({**tracked, f"{name}/{run_id}": sent}))
                tracker.send(row)
            if finished or not follow:
                return sent - before
            time.sleep(1)
    finally:
        tracker.finish()

def main():
    p = Parser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("what", choices=("trl", "card", *TRACKERS), help="what is written or sent")
    p.add_argument("--out", type=Path, default=Path("out"), help="folder of the run")
    g = p.add_argument_group("trackers")
    g.add_argument("--follow", action="store_true",
                   help="send rows as train.py writes them, until it has finished")
    g = train.add_row_flags(p)
    g.add_argument("--strip-cot", choices=("harmful", "all"), help="as for train.py")
    g.add_argument("--model", help="student, as for train.py")
    g.add_argument("--limit", type=positive, help="rows, as for train.py")
    g.add_argument("--max-length", type=positive, help="tokens of a row, as for train.py")
    g.add_argument("--seed", type=seed_value, help="of the draw of --limit rows")
    args = p.parse_args()
    if args.what == "trl":
        examples, tokenizer = load_examples(args)
        args.out.mkdir(parents=True, exist_ok=True)
        export_trl(args.out / "trl.jsonl", examples, tokenizer)
    elif args.what == "card":
        path = args.out / "model" / "README.md"
        refuse_linked_folder(path.parent)
        write_atomic(path, str(model_card(args.out)))
        print(escape_control_chars(f"  -> {path}"))
    else:
        n = send_metrics(args.what, args.out, args.follow)
        print(escape_control_chars(f"sent {n} rows of {args.out}/metrics.jsonl to {args.what}"))

if __name__ == "__main__":
    cli(main)

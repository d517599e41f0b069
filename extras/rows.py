"""
The rows that train.py trains on, for the scripts here that need the same ones.

    p = make_parser(__doc__)
    add_row_flags(p)
    train.add_training_flags(p)
    args = p.parse_args()
    model, tokenizer, config, examples, skipped = load_examples(args, train.encode_rows)
"""
import train
from data.benchmarks import BENCHMARKS, overlap
from data.sources import balanced_subset, label_counts, training_rows
from data.run_record import read_run
from thinksafe import LABELS, TINY, InputError, escape_control_chars, is_tiny

def add_row_flags(p):
    """Add --data and --label -> the group of flags, for more of them."""
    g = p.add_argument_group("rows")
    g.add_argument("--data", help="rows, as for train.py --data (default: OUT/guarded.jsonl)")
    g.add_argument("--label", choices=LABELS, metavar="LABEL", help="what prompts are that have no "
                   f"label of their own: {', '.join(LABELS)}")
    return g

def read_training_rows(args, run, read=training_rows):
    """Read the rows of --data, or those that guard.py has written.

    read: training_rows, or prompt_rows where no responses are needed. Raises InputError when
    guard.py has not finished and there is no --data."""
    judged = run.get("guard", {})
    if args.data is None and not judged.get("finished"):
        raise InputError(f"{args.out}: guard.py has not finished there; run it first, or give rows "
                         "with --data FILE")
    rows = read(args.data or args.out, args.label)
    if args.data is None and read is training_rows and len(rows) < judged.get("rows", 0):
        raise InputError(f"{args.out}/guarded.jsonl: {len(rows)} of the {judged['rows']} rows that "
                         "guard.py wrote are there; run it again, or give rows with --data FILE")
    return rows

def print_rows(rows, student):
    """Print how many rows there are of each label, and how many have a prompt of evaluation.

    student: folder of the model."""
    benchmarks = [TINY / "eval.jsonl"] if is_tiny(student) else list(BENCHMARKS)
    print(escape_control_chars(f"data: {label_counts(rows)}\n{overlap(rows, benchmarks)}"))

def draw_examples(args, examples, skipped):
    """Return --limit of the examples. Raises InputError when there are none."""
    if not examples:
        raise InputError(f"none of the rows can be trained on ({dict(skipped)})")
    if args.limit and args.limit < len(examples):
        skipped["not_drawn"] = len(examples) - args.limit
        examples = balanced_subset(examples, args.limit, args.seed)
    return examples

def load_examples(args, encode, read=training_rows):
    """Do what train.py does before it trains -> (model, tokenizer, config, examples, skipped).

    Args:
        encode: f(rows, tokenizer, max_length) -> (examples, Counter of skipped rows by reason),
            such as train.encode_rows.
        read: see `read_training_rows`.

    The student has LoRA on it unless --full."""
    run = read_run(args.out)
    rows = read_training_rows(args, run, read)
    model, tokenizer, config = train.load_student(args, run)
    print_rows(rows, model.folder)
    max_length = min(config["max_length"], model.config.max_position_embeddings)
    examples, skipped = encode(rows, tokenizer, max_length)
    return model, tokenizer, config, draw_examples(args, examples, skipped), skipped

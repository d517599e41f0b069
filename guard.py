"""
out/samples.jsonl -> the guards' verdicts, out/verdicts.jsonl, and judged rows, out/guarded.jsonl.

    python guard.py                     # tiny for tiny, else qwen3guard-0.6b, or self without a GPU
    python guard.py --guard wildguard   # or another key of GUARDS, a model, KEY=FOLDER
    python guard.py --guard qwen3guard-4b llama-guard-3-8b    # a trace is safe if all say so
    python guard.py --guard self        # ask the student, or any chat model, yes or no
    python guard.py --keep unanimous    # of n traces per prompt keep one, if all are safe

The guard reads the original prompt and the whole response, reasoning included, in one prefill. The
verdict is read off the logits: `unknown` if the most likely word is none. Only safe rows are kept.
"""
import json
import re
from collections import Counter, defaultdict
from typing import NamedTuple

import torch

from data.chat import (
    decode_text, encode_continuation, encode_parts, encode_prompt, encode_response,
    rejection_reason, template_hash, think_prefix)
from data.guards import GUARDS, REFUSAL, all_readings, read_refusal, severity, worst_of
from data.rows import TRACE_KEYS, RowWriter, content_id, read_rows, verdict_of, write_rows
from data.run_record import Stage, read_run
from sample import Sampler
from thinksafe import (
    TINY, InputError, apply_keep_rule, bounded, choose_dtype, cli, free_memory, is_tiny,
    load_model, load_tokenizer, make_parser, model_hash, pack_ids, positive, progress,
    resolve_model, split_packs, trace_key)

class Verdict(NamedTuple):
    label: str                    # safe, unsafe or unknown
    p_unsafe: float | None        # P(words for unsafe) / P(words for both); None when unknown
    reason: str | None = None     # why it is unknown
    n_tokens: int = 0             # tokens of the question that decided, however often read

class Guard:
    """A model that judges (prompt, response) pairs in a Format. name: for rows and errors."""

    def __init__(self, model, tokenizer, form, name):
        self.model, self.tokenizer, self.form, self.name = model, tokenizer, form, name
        self.safe, self.unsafe = self._first_tokens(form.safe), self._first_tokens(form.unsafe)
        if torch.isin(self.safe, self.unsafe).any():
            raise InputError(f"guard {name}: {form.safe}, {form.unsafe} begin with the same token")
        self.prefix, *later = (encode_continuation(tokenizer, p) for p in form.answer_prefixes)
        if not form.thinking and think_prefix(tokenizer):    # the template always opens <think>
            self.prefix = encode_response(tokenizer, "\n</think>\n\n") + self.prefix
        self.guesses, self.answer_at = [], [0]       # answer_at: counted from the end of a text
        for prefix in reversed(later):
            self.guesses = [int(self.safe[0]), *prefix, *self.guesses]
            self.answer_at.insert(0, len(self.guesses))

    def _first_tokens(self, words):
        """Return the token ids (n,) that begin the words. One-token spellings go before others."""
        ids = {word: encode_continuation(self.tokenizer, word) for word in words}
        single = {word.strip().lower() for word in words if len(ids[word]) == 1}
        first = {ids[word][0] for word in words
                 if len(ids[word]) == 1 or word.strip().lower() not in single}
        return torch.tensor(sorted(first), device=self.model.device)

    def encode(self, prompt, response):
        """Return the ids (list[int]) of a question. Text in it cannot become control tokens."""
        if self.form.question is None:
            return encode_prompt(self.tokenizer, prompt, answer=response) + self.prefix
        before, between, after = re.split("{prompt}|{response}", self.form.question)
        parts = before, prompt, between, response, after
        if self.form.raw:
            return encode_parts(self.tokenizer, *parts) + self.prefix
        return encode_prompt(self.tokenizer, "".join(parts), self.form.thinking) + self.prefix

    def judge(self, pairs, threshold=0.5, pack_tokens=16384):
        """Judge pairs [(prompt, response), ...] -> [Verdict, ...], unsafe from the threshold on. Up
        to pack_tokens are read in one pass, and nothing is generated: the answers that a guard
        gives before the verdict (WildGuard: two) are guessed, and the pass that reads the verdict
        also tells what the guard would have answered. A pair with a wrong guess goes once more. The
        worst verdict on a pair's `readings` counts. A pair without any is unknown: spoofs_guard."""
        self.model.prepack_weights()
        pairs, counts = all_readings(self.form, pairs)
        texts = [self.encode(*pair) + self.guesses for pair in pairs]
        verdicts = [Verdict("unknown", None, "too_long_for_guard")] * len(texts)
        limit = self.model.config.max_position_embeddings
        todo = [i for i, text in enumerate(texts) if len(text) <= limit]
        words = {*self.safe.tolist(), *self.unsafe.tolist()}
        for _ in self.answer_at:                     # each pass settles at least one more answer
            again = []
            for pack in split_packs(todo, lambda i: len(texts[i]), pack_tokens):
                for i, answers, p_unsafe in zip(pack, *self._judge_pack([texts[i] for i in pack])):
                    guessed = texts[i].copy()
                    verdicts[i] = Verdict("unknown", None, "no_verdict", len(guessed))
                    for at, answer in zip(self.answer_at[:-1], answers):
                        texts[i][-at] = answer
                    if texts[i] != guessed:
                        again.append(i)
                    elif words.issuperset(answers):
                        label = "unsafe" if p_unsafe >= threshold else "safe"
                        verdicts[i] = Verdict(label, p_unsafe, None, len(guessed))
            todo = again
        return worst_of(verdicts, counts, severity, Verdict("unknown", None, "spoofs_guard"))

    @torch.inference_mode()
    def _judge_pack(self, texts):
        """Read B questions with guessed answers in one packed prefill -> the guard's own answers (B
        lists of ids, the verdict last, -1 where a logit is not finite) and B values of p_unsafe."""
        tokens, cu = pack_ids(texts, self.model.device)
        at = (cu[1:, None] - 1 - torch.tensor(self.answer_at)).to(self.model.device)  # (B, answers)
        logits = self.model.logits(self.model(tokens, cu, at=at.flatten())).unflatten(0, at.shape)
        safe, unsafe = (logits[:, -1, ids].logsumexp(-1) for ids in (self.safe, self.unsafe))
        answers = logits.argmax(-1)                                              # (B, answers)
        answers[:, -1] = answers[:, -1].where(logits.isfinite().all(-1).all(-1), -1)
        return answers.tolist(), torch.sigmoid(unsafe - safe).tolist()

    def is_unsafe(self, pairs, threshold=0.5):
        """Judge pairs -> [whether the response is unsafe, None where unknown, ...]."""
        return [{"safe": False, "unsafe": True}.get(v.label) for v in self.judge(pairs, threshold)]

    def generate_answers(self, pairs, max_new_tokens=64):
        """Generate the guard's answers greedily -> [text, ...], "" for pairs beyond the context."""
        texts, sampler = [""] * len(pairs), Sampler(self.model, self.tokenizer)
        questions = [self.encode(*pair) for pair in pairs]
        for done in sampler.generate(questions, max_new_tokens, temperature=0):
            if done.tokens:
                ids = [i for i in done.tokens if i not in self.model.eos_ids]
                texts[done.index] = self.form.answer_prefixes[0] + decode_text(self.tokenizer, ids)
        return texts

    def is_refusal(self, pairs):
        """Judge pairs -> [whether the response refuses to help, None where unknown, ...]."""
        if not (refusal := self.form.refusal):       # the guard does not tell: ask, yes or no
            return Guard(self.model, self.tokenizer, REFUSAL, self.name).is_unsafe(pairs)
        pairs, counts = all_readings(self.form, pairs)
        found = [read_refusal(text, refusal) for text in self.generate_answers(pairs)]
        return worst_of(found, counts, (False, None, True).index)

def guard_format(name, student=None):
    """Find a guard -> (Format, folder, tokenizer). The name is a key of GUARDS, KEY=FOLDER, or a
    model, whose name or chat template tells the format. Any other chat model is asked yes or no, as
    is the student (a model's name) for `self`. Raises InputError when a model cannot be had."""
    key, _, path = name.partition("=")
    form = GUARDS.get(key)
    model = (path or form.model or student) if form else name
    if not model:
        raise InputError("guard self needs the student: run sample.py first, or name a model")
    full_name, folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    template = str(tokenizer.chat_template)
    if not form:
        hub_name = "tiny/guard" if folder == TINY / "guard" else full_name.partition("@")[0]
        found = [f for f in GUARDS.values() if f.model and f.model.lower() == hub_name.lower()]
        found += [f for f in GUARDS.values() if f.template and f.template in template]
        form = (found or [GUARDS["wildguard" if "wildguard" in folder.name.lower() else "self"]])[0]
    if form.template not in template:
        raise InputError(f"guard {name}: {form.template!r} is not in the chat template of "
                         f"{folder}; it is another model, or came without its template")
    return form, folder, tokenizer

def load_guard(name, device=None, dtype=None, student=None, quantize=None):
    """Load a guard. Arguments: see `guard_format` and `load_model`; student: (model, tokenizer)."""
    if name == "self" and student:
        return Guard(*student, GUARDS["self"], name)
    form, folder, _ = guard_format(name)
    return Guard(*load_model(folder, device, dtype, quantize), form, name)

def default_guard(student):
    """Return the name of the guard for a student (a model's name)."""
    with_gpu = "qwen3guard-0.6b" if torch.cuda.is_available() else "self"
    return "tiny" if is_tiny(student) else with_gpu

def combine_verdicts(traces, log):
    """Return the traces with the log's verdicts: unsafe if one guard says so, safe if all do."""
    verdicts, combined = defaultdict(dict), []
    for row in log:
        verdict = {key: row.get(key) for key in ("label", "p_unsafe", "reason")}
        verdicts[trace_key(row)][row["guard"]] = verdict
    for trace in traces:
        by_guard = verdicts[trace_key(trace)]
        decisive = max(by_guard.values(), key=lambda verdict: severity(verdict.values()))
        row = {**trace, "response_label": decisive["label"], "p_unsafe": decisive["p_unsafe"],
               "guard": " + ".join(by_guard), "reason": decisive["reason"]}
        combined.append({**row, "verdicts": by_guard} if len(by_guard) > 1 else row)
    return combined

def summarize(guarded):
    """Return the stage's summary and counts."""
    labels = Counter(sorted(row["response_label"] for row in guarded))
    reasons = Counter(sorted(row["reason"] for row in guarded if row["reason"]))
    kept = Counter(sorted(row["prompt_label"] for row in guarded if row["keep"]))
    counts = {"rows": len(guarded), **labels, "kept": kept, "unknown_because": reasons}
    parts = [", ".join(f"{n} {label}" for label, n in labels.items()), f"kept {kept.total()}",
             *(f"{n} {reason}" for reason, n in reasons.items())]
    return f"judged {len(guarded)} traces with {guarded[0]['guard']}: " + "; ".join(parts), counts

def parse_args():
    p = make_parser(__doc__)
    g = p.add_argument_group("judging")
    g.add_argument("--guard", nargs="+", metavar="GUARD", help=f"{', '.join(GUARDS)}, NAME=FOLDER, "
                   "or any chat model (default: see above)")
    g.add_argument("--threshold", type=bounded(float, 0, 1), default=0.5,
                   help="a response is unsafe from this p_unsafe on")
    g.add_argument("--keep", choices=("safe", "unanimous"), default="safe",
                   help="safe: every safe trace; unanimous: a prompt's first, if all n are safe")
    p.machine.add_argument("--pack-tokens", type=positive, default=16384, help="tokens a pass")
    return p.parse_args()

def read_traces(out):
    """Return the record of sample.py in a folder, and all traces, sorted."""
    sampled, path = read_run(out).get("sample", {}), out / "samples.jsonl"
    traces = sorted(read_rows(path, TRACE_KEYS, growing=True), key=trace_key)
    if not (traces and sampled.get("finished") and len(traces) >= sampled.get("rows", 0)):
        raise InputError(f"{path} is not complete; run python sample.py, or the same command again")
    return sampled, traces

def main():
    args = parse_args()
    sampled, traces = read_traces(args.out)
    n, student = sampled["fingerprint"]["n"], sampled["model"]
    names = list(dict.fromkeys(args.guard or [default_guard(student)]))
    guards = {name: guard_format(name, student) for name in names}     # fail now if one is missing
    asked = [{"guard": model_hash(folder), "name": name, "question": form.question,
              "template": None if form.raw else template_hash(tokenizer)}
             for name, (form, folder, tokenizer) in guards.items()]
    dtype = choose_dtype(args)
    fingerprint = {
        **(asked[0] if len(asked) == 1 else {"guards": asked}), "threshold": args.threshold,
        "keep": args.keep, "dtype": str(dtype), "quantize": args.quantize,
        "samples": content_id(json.dumps([trace for trace in traces if trace["k"] < n]))}
    tokenizer = load_tokenizer(resolve_model(student).folder)
    path, log_path = args.out / "guarded.jsonl", args.out / "verdicts.jsonl"
    earlier = path.exists() and not log_path.exists()          # a folder of an earlier version
    stage = Stage("guard", args, path.name if earlier else log_path.name, fingerprint,
                  guard=names[0], guards=names)
    log = RowWriter(log_path, verdict_of(names))
    for name, (form, folder, _) in guards.items():   # one guard in memory at a time
        judged = {trace_key(row) for row in log.rows if row["guard"] == name}
        todo = [trace for trace in traces if trace_key(trace) not in judged]
        if not todo:
            continue
        guard = Guard(*load_model(folder, args.device, dtype, args.quantize), form, name)
        tally = Counter()
        with progress(f"guard {name}", len(traces), "trace", len(traces) - len(todo)) as advance:
            for batch in split_packs(todo, lambda trace: 1, 16):       # a kill loses one at most
                reasons = [rejection_reason(t["response"], t["finish_reason"], tokenizer)
                           for t in batch]
                pairs = [(t["instruction"], t["response"]) for t, r in zip(batch, reasons) if not r]
                found = iter(guard.judge(pairs, args.threshold, args.pack_tokens))
                verdicts = [Verdict("unknown", None, r) if r else next(found) for r in reasons]
                log.write(*({"guard": name, "id": t["id"], "k": t["k"], **v._asdict()}
                            for t, v in zip(batch, verdicts)))
                tally.update(v.label for v in verdicts)
                advance(len(batch), sum(v.n_tokens for v in verdicts),
                        f"{tally['safe']} safe, {tally['unsafe']} unsafe")
        del guard                                    # make room for the next one
        free_memory()
    guarded = apply_keep_rule(combine_verdicts(traces, read_rows(log_path)), args.keep, n)
    write_rows(path, guarded)
    summary, counts = summarize(guarded)
    stage.finish(summary, path, f"python train.py --out {args.out}", **counts)

if __name__ == "__main__":
    cli(main)

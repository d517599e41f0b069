"""
Text to token ids and back, through the model's chat template.

    from data.chat import decode_response, encode_prompt
    ids = encode_prompt(tokenizer, "How do I bake a cake?")          # as apply_chat_template

Text is not control: no control token can come out of a prompt or a response. `<|im_end|>` inside a
prompt is encoded as the characters that it consists of, for the student and for the guard.
"""
import contextlib
import functools
import json
import re
import signal
import string
import threading
from datetime import datetime

from data.rows import content_id
from thinksafe import InputError

class OutOfTime(BaseException):
    """Not an Exception: math-verify, sympy and jinja's callers catch those and go on."""

@contextlib.contextmanager
def time_limit(seconds):
    """Raise OutOfTime after so many seconds of CPU time. Without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise OutOfTime
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)    # again: destructors can swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

@functools.lru_cache(maxsize=16)
def control_tokens(tokenizer):
    """Return {string: id} of the added tokens that steer a model: all special ones, and of the rest
    those of more than one character that are not white space, as Qwen3's <think>. An unknown token
    that is not special does not count: it only stands for characters that the vocabulary lacks."""
    found = {}
    for i, token in tokenizer.added_tokens_decoder.items():
        names_a_word = len(token.content) > 1 and token.content.strip()
        if token.special or names_a_word and i != tokenizer.unk_token_id:
            found[token.content] = i
    return found

def encode_continuation(tokenizer, text):
    """Return the token ids (list[int]) of plain text that continues other text. SentencePiece
    would encode its first word as if a space stood before it, so a line end stands there here."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + text, add_special_tokens=False)
    if ids[:len(newline)] == newline:
        return ids[len(newline):]
    return tokenizer.encode(text, add_special_tokens=False)

def encode_parts(tokenizer, *parts, continues=False):
    """Return the token ids (list[int]) of the parts, joined: in turns a template's own text and
    text of a user or model. Only the template's text becomes control tokens. continues: they
    continue other text (see `encode_continuation`).

    Ordinary text is encoded in one piece, as apply_chat_template does. Where a user's text spells a
    control token, it is cut after that spelling's first character. The last try cuts between all
    characters, for control tokens that the tokenizer's normalization puts together. Raises
    InputError where even single characters become control tokens."""
    control = set(control_tokens(tokenizer).values())
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    wanted = [i for part in parts[::2] for i in encode(part) if i in control]
    words = sorted(control_tokens(tokenizer), key=len, reverse=True)
    spelling = f"(?=({'|'.join(map(re.escape, words)) or '(?!)'}))"   # finds overlapping ones too
    for find_cuts in (lambda text: [],
                      lambda text: [match.start() + 1 for match in re.finditer(spelling, text)],
                      lambda text: list(range(1, len(text)))):
        pieces = [""]
        for n, part in enumerate(parts):
            cuts = [0, *(find_cuts(part) if n % 2 else []), len(part)]
            pieces[-1] += part[:cuts[1]]
            pieces += [part[a:b] for a, b in zip(cuts[1:], cuts[2:])]
        ids = [] if continues else encode(pieces.pop(0))
        for piece in pieces:
            ids += encode_continuation(tokenizer, piece)
        if [i for i in ids if i in control] == wanted:
            return ids
    raise InputError(f"{tokenizer.name_or_path}: text cannot be told from the tokenizer's control "
                     "tokens; use another model")

def encode_response(tokenizer, text, continues=True):
    """Return the token ids (list[int]) of a response, without eos. Only <think> and </think> in it
    are control tokens. continues=False: SentencePiece's first word is as behind a space."""
    return encode_parts(tokenizer, "", *re.split("(</?think>)", text), continues=continues)

# Where a template writes the time of day or the date, it gets those of the day that Llama 3.2's
# falls back on: a macro takes the place of transformers' strftime_now.
TEMPLATE_DATE = datetime(2024, 7, 26)
DIRECTIVES = [f"%{dash}{c}" for c in string.ascii_letters if c != "s" for dash in ("", "-")]
STILL_CLOCK = (                                      # without %s, which is the time zone's too
    "{% macro strftime_now(format) %}{% set ns = namespace(text=format) %}{% for old, new in "
    + json.dumps({d: TEMPLATE_DATE.strftime(d) for d in DIRECTIVES}) + ".items() %}"
    "{% set ns.text = ns.text|replace(old, new) %}{% endfor %}{{ ns.text }}{% endmacro %}\n")

def render_template(tokenizer, texts, in_lists=False, **options):
    """Render the chat template with a user's message, and an assistant's if there are two texts.
    in_lists: a message is a list of parts. Raises InputError for a template that is missing, fails
    or takes too long."""
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise InputError(f"{name}: the tokenizer has no chat template; use an instruction-tuned "
                         "model")
    contents = [[{"type": "text", "text": text}] for text in texts] if in_lists else texts
    messages = [{"role": role, "content": content}
                for role, content in zip(("user", "assistant"), contents)]
    try:
        with time_limit(10):
            return tokenizer.apply_chat_template(
                messages, chat_template=STILL_CLOCK + tokenizer.get_chat_template(), tokenize=False,
                date_string="26 Jul 2024", **options)
    except (Exception, OutOfTime) as e:                # jinja raises whatever the template wants
        raise InputError(f"{name}: its chat template fails ({e or 'it takes too long'})")

def join_parts(parts, strips, texts):
    """Return [part, text, part, ..., part]: the texts of the turns between a template's parts."""
    joined = []
    for part, text, strip in zip(parts, texts, strips):
        joined += [part, text.strip() if strip else text]
    return [*joined, parts[-1]]

MARKS = "user \ue000", "assistant \ue000"

def probe_texts(tokenizer):
    """Return a user's and an assistant's text with whatever a template may look for or change: all
    printable characters and control tokens, switches of known templates, and great length."""
    found = " ".join([string.printable, "{{c}} \\d \x85 \u2028 \u00e9", "/think <tool_response>",
                      *control_tokens(tokenizer), 20_000 * "y "])
    return f"Is {found}?\n\n/no_think /nothink", f"## {found}\n\n\t* x"

@functools.lru_cache(maxsize=64)
def chat_template_parts(tokenizer, thinking=True, turns=1):
    """Split the chat template's text around the messages -> (turns + 1 parts, turns flags). A flag
    tells whether the template strips the message.

    thinking=False asks for the form without reasoning, where a template knows one (Qwen3). turns=2:
    a user's message and the assistant's answer. Raises InputError unless the template writes fixed
    text around each message, and the message exactly once, as it is or stripped: `probe_texts` are
    tried, with and without white space around them."""
    render = functools.partial(render_template, tokenizer, add_generation_prompt=True,
                               enable_thinking=thinking)
    marks = MARKS[:turns]
    for in_lists in (False, True):                     # True: Llama-Guard-3-1B
        parts = re.split("|".join(marks), render(marks, in_lists))
        if len(parts) == turns + 1:
            break
    else:
        raise InputError(f"{tokenizer.name_or_path}: its chat template does not show the text of "
                         "each turn exactly once")
    padded = [f" \n{mark}\n " for mark in marks]
    text = render(padded, in_lists)
    strips = [mark not in text for mark in padded]
    probes = probe_texts(tokenizer)[:turns]
    for texts in (padded, probes, [f"\t{x} " for x in probes], [f"\n{x}\n" for x in probes]):
        if render(texts, in_lists) != "".join(join_parts(parts, strips, texts)):
            raise InputError(f"{tokenizer.name_or_path}: its chat template changes the text of a "
                             "turn, or writes something else for another text")
    return parts, strips

@functools.lru_cache(maxsize=16)
def turn_end(tokenizer):
    """Return the id of the token that the chat template writes behind an assistant's message, or
    where that is none, of the tokenizer's eos. Raises InputError if there is neither."""
    control = control_tokens(tokenizer)
    with contextlib.suppress(InputError):
        text = render_template(tokenizer, MARKS, add_generation_prompt=False)
        _, answer, end = text.rpartition(MARKS[1])
        for word in sorted(control, key=len, reverse=True):
            if answer and end.lstrip().startswith(word):
                return control[word]
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: no token ends a turn, neither in the chat "
                         "template nor as eos_token")
    return tokenizer.eos_token_id

def encode_prompt(tokenizer, text, thinking=True, answer=None):
    """Return the token ids (list[int]) of a one-turn chat up to where the response begins: for
    ordinary text those of apply_chat_template. answer: the assistant's message, for the template
    of a guard, which judges it. thinking: see `chat_template_parts`."""
    texts = [text] if answer is None else [text, answer]
    parts, strips = chat_template_parts(tokenizer, thinking, len(texts))
    return encode_parts(tokenizer, *join_parts(parts, strips, texts))

def think_prefix(tokenizer):
    """Return what the chat template writes of a response: R1's "<think>\\n", Qwen3's ""."""
    found = re.search(r"<think>\s*$", chat_template_parts(tokenizer)[0][-1])
    return found[0] if found else ""

def normalize_think_tags(response, tokenizer):
    """Return any model's response whole: it begins with what the student's template writes of it
    (`think_prefix`). Nothing else changes but an opening tag that would then be there twice."""
    prefix = think_prefix(tokenizer)
    if response.startswith(prefix):
        return response
    return prefix + (re.sub(r"\A\s*<think>\n?", "", response) if prefix else response)

def template_hash(tokenizer):
    """Return a hash of what the chat template writes around messages. Raises InputError where there
    is no usable template."""
    frames = [chat_template_parts(tokenizer)]
    for options in ({"thinking": False}, {"turns": 2}):          # as guards are asked
        with contextlib.suppress(InputError):
            frames.append([options, *chat_template_parts(tokenizer, **options)])
    return content_id(json.dumps(frames, sort_keys=True))

def decode_text(tokenizer, ids):
    """Return the text of token ids as it is: control tokens stay, spaces are not cleaned up."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

def decode_continuation(tokenizer, ids):
    """Return the text of token ids that continue other text: `encode_continuation` backwards."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    return decode_text(tokenizer, newline + ids).removeprefix("\n")

def decode_response(tokenizer, tokens, eos_ids):
    """Return the whole text of a sampled response: it begins with what the template wrote
    (`think_prefix`), and the closing eos token is left out. Where SentencePiece's first token has
    a space, the text begins with that."""
    tokens = tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens
    return think_prefix(tokenizer) + decode_continuation(tokenizer, tokens)

def reopens_thought(answer):
    """Tell whether an answer goes back to reasoning: it begins with <think>, or has a line of that
    alone. Other answers only name the tag."""
    return bool(re.search(r"\A\s*<think>|^[ \t]*<think>[ \t\r]*$", answer, re.M))

def rejection_reason(response, finish_reason, tokenizer):
    """Say why a trace cannot be trained on (its finish_reason, such as length or prompt_too_long,
    else empty or unclosed_think), or return None. Where the vocabulary has </think>, a trace
    without one never finished its reasoning. The paper drops those traces too."""
    if finish_reason != "stop":
        return str(finish_reason or "unfinished")
    answer = response.rpartition("</think>")[2]
    if not answer.strip():
        return "empty"
    reasons = "</think>" in control_tokens(tokenizer) or think_prefix(tokenizer)
    unclosed = reasons and "</think>" not in response
    return "unclosed_think" if unclosed or reopens_thought(answer) else None

def trace_end(tokenizer, eos):
    """Return the id of `eos`, the token that a trace ended in, if it is one of the tokenizer's,
    else that of `turn_end`. eos: whatever a row has there: rows may come from other tools."""
    if isinstance(eos, str):
        if eos in control_tokens(tokenizer):
            return control_tokens(tokenizer)[eos]
        ids = encode_continuation(tokenizer, eos)        # an ordinary token can be an eos too
        if len(ids) == 1:
            return ids[0]
    return turn_end(tokenizer)

def encode_training_pair(tokenizer, prompt, response, eos=None):
    """Return the token ids of a prompt as the chat template renders it, and the ids to learn: the
    response and the token that ends it (`trace_end`).

    A chat template is never put around a response, because templates delete <think>. What the
    template itself writes of the response (`think_prefix`) belongs to the prompt. A trace, which
    has an `eos`, is encoded as it was sampled; of other tools' responses SentencePiece's first word
    gets the space that it has behind a prompt, unless that ends in a line end."""
    response = normalize_think_tags(response, tokenizer).removeprefix(think_prefix(tokenizer))
    continues = isinstance(eos, str) or chat_template_parts(tokenizer)[0][-1][-1:].isspace()
    return encode_prompt(tokenizer, prompt), [
        *encode_response(tokenizer, response, continues), trace_end(tokenizer, eos)]

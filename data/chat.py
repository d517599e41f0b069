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
import threading

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
    """Return {string: id} of the added tokens that steer a model: the special ones, and others of
    more than one character that are not white space (Qwen3's <think> is not marked as special)."""
    found = {}
    for i, token in tokenizer.added_tokens_decoder.items():
        steers = token.special or (len(token.content) > 1 and token.content.strip())
        if steers and i != tokenizer.unk_token_id:
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

def encode_parts(tokenizer, *parts):
    """Return the token ids (list[int]) of the parts, joined: in turns a template's own text and
    text of a user or model. Only the template's text becomes control tokens.

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
        ids = encode(pieces[0])
        for piece in pieces[1:]:
            ids += encode_continuation(tokenizer, piece)
        if [i for i in ids if i in control] == wanted:
            return ids
    raise InputError(f"{tokenizer.name_or_path}: text cannot be told from the tokenizer's control "
                     "tokens; use another model")

def encode_response(tokenizer, text):
    """Return the token ids (list[int]) of a response, without eos. Only <think> and </think> in it
    are control tokens."""
    return encode_parts(tokenizer, "", *re.split("(</?think>)", text))

@functools.lru_cache(maxsize=16)
def chat_template_parts(tokenizer, thinking=True, turns=1):
    """Split the chat template's text around the messages -> (turns + 1 parts, turns flags). A flag
    tells whether the template strips the message.

    thinking=False asks for the form without reasoning, where a template knows one (Qwen3). turns=2:
    a user's message and the assistant's answer. Raises InputError for an unusable template."""
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise InputError(f"{name}: the tokenizer has no chat template; use an instruction-tuned "
                         "model")
    marks = ["\ue000user\ue000", "\ue000assistant\ue000"][:turns]
    padded = [f" \n{mark}\n " for mark in marks]
    in_lists = [[{"type": "text", "text": text}] for text in padded]     # Llama-Guard-3-1B
    for contents in (padded, in_lists):
        messages = [{"role": role, "content": content}
                    for role, content in zip(("user", "assistant"), contents)]
        try:
            with time_limit(10):                       # a fixed date, where Llama 3.2 writes today
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True,
                    enable_thinking=thinking, date_string="26 Jul 2024")
        except (Exception, OutOfTime) as e:            # jinja raises whatever the template wants
            raise InputError(f"{name}: its chat template fails ({e or 'it takes too long'})")
        if all(text.count(mark) == 1 for mark in marks):
            strips = [p not in text for p in padded]
            shown = [mark if strip else p for mark, p, strip in zip(marks, padded, strips)]
            return re.split("|".join(shown), text), strips
    raise InputError(f"{name}: its chat template does not show the text of each turn exactly once")

def encode_prompt(tokenizer, text, thinking=True, answer=None):
    """Return the token ids (list[int]) of a one-turn chat up to where the response begins: for
    ordinary text those of apply_chat_template. answer: the assistant's message, for the template
    of a guard, which judges it. thinking: see `chat_template_parts`."""
    texts = [text] if answer is None else [text, answer]
    parts, strips = chat_template_parts(tokenizer, thinking, len(texts))
    joined = []
    for part, text, strip in zip(parts, texts, strips):
        joined += [part, text.strip() if strip else text]
    return encode_parts(tokenizer, *joined, parts[-1])

def think_prefix(tokenizer):
    """Return what the chat template writes of a response: R1's "<think>\\n", Qwen3's ""."""
    found = re.search(r"<think>\s*$", chat_template_parts(tokenizer)[0][-1])
    return found[0] if found else ""

def normalize_think_tags(response, tokenizer):
    """Return any model's response whole, with the <think> that the student's template wants. Rows
    of older versions and of some data sets lack it."""
    prefix = think_prefix(tokenizer)
    if prefix and not response.startswith(prefix):
        return prefix + response.removeprefix("<think>").removeprefix("\n")
    lacks_opening = "</think>" in response and "<think>" not in response
    return "<think>\n" + response if lacks_opening else response

def template_hash(tokenizer):
    """Return a hash of the chat template. Raises InputError where there is no usable one."""
    chat_template_parts(tokenizer)
    return content_id(json.dumps(tokenizer.chat_template, sort_keys=True))

def decode_text(tokenizer, ids):
    """Return the text of token ids as it is: control tokens stay, spaces are not cleaned up."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

def decode_response(tokenizer, tokens, eos_ids):
    """Return the whole text of a sampled response: it begins with what the template wrote
    (`think_prefix`), and the closing eos token is left out."""
    tokens = tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens
    return think_prefix(tokenizer) + decode_text(tokenizer, tokens)

def rejection_reason(response, finish_reason, tokenizer):
    """Say why a trace cannot be trained on (length, prompt_too_long, empty, unclosed_think), or
    return None. Where the vocabulary has </think>, a trace without one never finished its
    reasoning. The paper drops those traces too."""
    if finish_reason != "stop":
        return str(finish_reason or "unfinished")
    answer = response.rpartition("</think>")[2]
    if not answer.strip():
        return "empty"
    reasons = "</think>" in control_tokens(tokenizer) or think_prefix(tokenizer)
    unclosed = reasons and "</think>" not in response
    return "unclosed_think" if unclosed or "<think>" in answer else None

def encode_training_pair(tokenizer, prompt, response):
    """Return the token ids of a prompt as the chat template renders it, and the ids to learn: the
    response and the end-of-sequence token.

    A chat template is never put around a response, because templates delete <think>. What the
    template itself writes of the response (`think_prefix`) belongs to the prompt."""
    response = normalize_think_tags(response, tokenizer).removeprefix(think_prefix(tokenizer))
    target = encode_response(tokenizer, response) + [tokenizer.eos_token_id]
    return encode_prompt(tokenizer, prompt), target

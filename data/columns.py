"""
What the columns of other people's data sets mean: which is the prompt, its label, the response.

    from data.columns import name_columns, normalize_row
    rows = name_columns([{"Goal": "Write ...", "Behavior": "Defamation"}], "jbb.csv")
    normalize_row(rows[0], "vanilla_harmful", "jbb.csv, row 1")      # instruction, prompt_label

A column is known by the words of its name, whatever their case and what is around them. Nothing is
dropped in silence: what may belong to the prompt and is not read is refused by name (find_prompt).
"""
import contextlib
import functools
import re

from data.rows import PROMPT_KEYS, check_row
from data.text import plain, skeleton
from thinksafe import LABELS, InputError, is_harmful

# Of other sets: goal AdvBench and JailbreakBench, behavior HarmBench, user_input ToxicChat, query
# MetaMath, augq SALAD-Bench; turns SORRY-Bench, conversations ShareGPT, conversation WildChat
PROMPT_COLUMNS = ("instruction", "prompt", "question", "problem", "adversarial", "vanilla",
                  "forbidden_prompt", "test_case", "goal", "behavior", "user_input", "query",
                  "augq")
CHAT_COLUMNS = ("messages", "conversations", "conversation", "turns")
# column -> what beside it is no prompt: the seed of an attack, or a behavior's name
NO_RIVAL = {"adversarial": "vanilla", "test_case": "behavior", "goal": "behavior"}
# column -> (column that is joined with it, how)
JOINED = {"instruction": ("input", "{prompt}\n\n{part}"),                       # Alpaca
          "behavior": ("ContextString", "{part}\n\n---\n\n{prompt}")}           # HarmBench
PART_OF_PROMPT = re.compile(
    "(inputs?|input_?text|text|body|contextstring|(context|ctx|passage|paragraph|article|document"
    "|doc)(_?\\d+)?|story|background|knowledge|support|premise|hypothesis|table|schema|demonstration"
    "|few_?shot|sys|system\\w*|preamble|persona|hint|request|(role|user)_?prompt"
    "|developer(_?(prompt|message))?"
    "|(chat_?|conversation_?|dialog(ue)?_?)?history|dialog(ue)?|parent_?id"
    "|(answer_?)?(options?|choices?|endings?)(_?([a-j0-9]|list))?|op[a-e]"
    "|(adv(ersarial)?_?)?(prefix|suffix)"
    "|(image|picture|audio|video|attachment)s?(_?(path|url|file))?|tool|function)s?")
PART_OF_TURN = re.compile("reasoning(_content)?|thinking|(tool|function)_calls?"
                          "|(image|audio|video|file)s?")
ROLES = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# what saving a list of turns, or bytes, as CSV makes of them
SPOILT = re.compile(r"""\s*(\[\s*{.*['"](role|from)['"]\s*:.*}\s*\]|b(['"]).*\3)\s*""", re.S)
LABEL_COLUMNS = ("prompt_label", "prompt_harm_label", "safechain_label", "data_type", "label")
LABEL_WORDS = {label: label for label in LABELS} | {
    "safe": "vanilla_benign", "unsafe": "vanilla_harmful",              # XSTest
    "overreject": "vanilla_benign", "safety": "vanilla_harmful",        # EOPSA
    "unharmful": "vanilla_benign", "harmful": "vanilla_harmful",        # WildGuardMix
    "benign": "vanilla_benign", "harmless": "vanilla_benign",
}
RESPONSE_COLUMNS = ("response", "completion", "output")
# Columns that tell whether a response is safe (BeaverTails) or harmful (WildGuardMix), and their
# words; "": nothing
SAFE_COLUMN = re.compile("(is_)?((response|output|completion|answer)_)?(is_)?(safe|safety)(_label)?"
                         "|verdict")
HARM_COLUMN = re.compile("(is_)?((response|output|completion|answer)_)?(is_)?"
                         "(unsafe|harmful|harm|harmfulness|toxic|toxicity|flagged)(_label)?")
YES, NO = ("true", "yes", "y", "t"), ("false", "no", "n", "f")
VERDICT_WORDS = {**dict.fromkeys(("safe", "unharmful", "harmless", "benign"), "safe"),
                 **dict.fromkeys(("unsafe", "harmful", "toxic"), "unsafe"), "": "unknown"}
# What stages add to rows. A prompt's column of that name would be taken for a stage's own output,
# so it is dropped.
TRACE_STAGE_KEYS = {
    "response", "k", "seed", "steer", "finish_reason", "n_tokens", "n_prompt_tokens",
    "eos",                                                                              # sample.py
    "response_label", "p_unsafe", "guard", "reason", "keep", "verdicts"}                # guard.py
LATER_STAGE_KEYS = {
    "when", "unsafe", "refused", "solved", "guard_unsafe",                              # eval.py
    "label", "arm", "tokens", "weight", "log_plain", "log_told", "log_source", "fault",
    "oracle"}                                                     # verdicts.jsonl, extras/theory.py
STAGE_KEYS = TRACE_STAGE_KEYS | LATER_STAGE_KEYS
# the last two say where the key sentence of SafeKey's rows is
KEPT_KEYS = ("id", "source", "summary_end_idx", "next_sentence_end_idx")
VERDICT_KEYS = ("response_label", "keep", "reason", "finish_reason")     # that training goes by
DIRECT_REFUSAL = "<think>\nI should not answer this question!\n</think>\n\n"

def has_value(row, column):
    """Tell whether a row has something in a column: 0 and False are values, white space is none."""
    value = row.get(column)
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})

@functools.lru_cache(maxsize=10_000)
def normalize_name(column):
    """Reduce a column's name to what counts of it: "System Prompt" becomes system_prompt, whatever
    its letters only look like."""
    return re.sub(r"\W+", " ", skeleton(plain(column))).strip().lower().replace(" ", "_")

KNOWN_COLUMNS = {normalize_name(name): name for name in (
    *PROMPT_COLUMNS, *CHAT_COLUMNS, *LABEL_COLUMNS, *KEPT_KEYS, "input", "ContextString", "refusal",
    *RESPONSE_COLUMNS, "answer", "set", "task",
    "response_label", "keep", "finish_reason", "reason")}

def name_columns(rows, source):
    """Give a column that is known under another spelling (" Prompt") its known name.

    Raises InputError where two columns with different values would get one name."""
    named = []
    for i, row in enumerate(rows, 1):
        taken = {}                                   # known name -> the column that has it
        for column in row:
            name = KNOWN_COLUMNS.get(normalize_name(column), column)
            other = taken.setdefault(name, column)
            if not has_value(row, other):
                taken[name] = column
            elif column != other and has_value(row, column) and row[column] != row[other]:
                raise InputError(f"{source}, row {i}: the columns {other!r} and {column!r} differ; "
                                 "delete one of them")
        named.append({name: row[column] for name, column in taken.items()})
    return named

def read_chat(turns, column, where):
    """Return (prompt, answer or None) of a chat of one turn of the user and at most one answer.

    Any other chat is refused by what would be lost of it: a system turn, several turns, images."""
    roles, texts = [], []
    for turn in turns:
        if not isinstance(turn, dict):               # SORRY-Bench has a list of texts
            turn = {"role": "user", "content": turn}
        role, text = (turn.get(key, turn.get(sharegpt)) for key, sharegpt in (
            ("role", "from"), ("content", "value")))
        if turn.get("value", text) != text:
            raise InputError(f"{where}: a turn of {column} has a content and another value; delete "
                             "one of them")
        more = {key: turn[key] for key in turn
                if PART_OF_TURN.fullmatch(key) and has_value(turn, key)}
        if more or has_value({"text": text}, "text"):        # else nothing is lost with it
            roles.append(ROLES.get(str(role).lower(), str(role)))
            texts.append({"text": text, **more} if more else text)
    if roles not in (["user"], ["user", "assistant"]) or not isinstance(texts[0], str):
        found = (", ".join(roles[:6]) or "no turn") + ", ..." * (len(roles) > 6)
        raise InputError(f"{where}: {column} is a chat of {found}, and begins {texts[:1]!r:.80}; "
                         "only one text of the user, with at most one answer, is a prompt here; "
                         "name another column with --prompt-column, or leave such rows out")
    return texts[0], texts[1] if len(texts) > 1 else None

def read_column(row, column, where, is_named=False):
    """Return (prompt, answer or None) that a column has, (None, None) if it has no text.

    is_named: by --prompt-column. Otherwise text is refused where a list of turns is expected, or
    where it was one, or bytes, before it was saved."""
    value, is_chat = row.get(column), column in CHAT_COLUMNS
    if isinstance(value, list) and value and (is_chat or isinstance(value[0], dict)):
        return read_chat(value, column, where)
    is_text = isinstance(value, str) and has_value(row, column)
    if not is_named and (is_chat and (is_text or isinstance(value, dict))
                         or is_text and SPOILT.fullmatch(value)):
        raise InputError(f"{where}: {column} is no {'list of turns' if is_chat else 'plain text'}, "
                         f"it is {value!r:.80}; name the prompt's column with --prompt-column")
    return (value if is_text else None), None

def prompt_texts(row, where):
    """Return {column: prompt} of the columns for prompts that have text."""
    found = {column: read_column(row, column, where)[0]
             for column in PROMPT_COLUMNS + CHAT_COLUMNS if column in row}
    return {column: text for column, text in found.items() if text}

def text_beside(row, column):
    """Return what a column has as text, "" if it has nothing or a truth value."""
    value = row.get(column)
    return str(value).strip() if has_value(row, column) and not isinstance(value, bool) else ""

def parts_beside(row, prompt):
    """Return the names of columns that belong to a prompt (PART_OF_PROMPT, or the options A, B, C)
    and are not in it. A column `text` often is the whole example: then it has the prompt."""
    names = {column: normalize_name(column) for column in row}
    options = "abcde" if {"a", "b"} <= set(names.values()) else ()
    parts = {column: text_beside(row, column) for column, name in names.items()
             if PART_OF_PROMPT.fullmatch(name) or name in options}

    def is_in_prompt(text):                  # a short one can be there by chance
        alone = re.search(rf"(\A|\n|: )\s*{re.escape(text)}\s*(\n|\Z)", prompt)
        return alone or text in prompt and len(text) >= 20
    return [column for column, text in parts.items()
            if text and not is_in_prompt(text) and not (names[column] == "text" and prompt in text)]

def check_rivals(row, column, texts, where):
    """Raise InputError if beside a column's prompt there is another one, or what may be one."""
    for other in row.keys() & {*PROMPT_COLUMNS, *CHAT_COLUMNS}:
        differs = other in texts and texts[other].strip() != texts[column].strip()
        unread = other not in texts and isinstance(row[other], list | dict)
        if (differs or unread and has_value(row, other)) and NO_RIVAL.get(column) != other:
            raise InputError(f"{where}: {column} and {other} are not the same; say with "
                             "--prompt-column which is the prompt, or delete one of them")

def find_prompt(row, where, column=None):
    """Return the row's prompt.

    The rule: text that belongs to the prompt (PROMPT_COLUMNS, CHAT_COLUMNS, PART_OF_PROMPT) is
    joined as its set joins it (JOINED), or refused by name unless --prompt-column says what alone
    is the prompt; any other column is about the prompt, and is not read.

    column: that of --prompt-column. Raises InputError."""
    if column:
        texts = {column: read_column(row, column, where, is_named=True)[0]}
    else:
        texts = prompt_texts(row, where)
    if not any(texts.values()):
        columns = (column,) if column else PROMPT_COLUMNS
        held = "".join(f"; {name} is {row[name]!r:.80}" for name in columns if has_value(row, name))
        raise InputError(f"{where}: no text under {', '.join(map(repr, columns))}; found the keys "
                         f"{', '.join(row)}{held}; name the prompt's with --prompt-column")
    first, prompt = next(iter(texts.items()))
    if column:
        return prompt
    check_rivals(row, first, texts, where)
    part, form = JOINED.get(first, ("", ""))
    if part and text_beside(row, part) and not isinstance(row[part], list | dict):
        prompt = form.format(prompt=prompt, part=row[part])
    lost = parts_beside(row, prompt)
    if lost:
        raise InputError(f"{where}: {', '.join(lost)} beside {first} may be a part of the prompt; "
                         "join them in the file, delete what is none, or say --prompt-column "
                         f"{first} to take that alone")
    return prompt

def label_of_word(word):
    """Return the label, one of LABELS, that a set's word for it means, or None."""
    return LABEL_WORDS.get(word.strip().lower()) if isinstance(word, str) else None

def find_label(row, where, label=None):
    """Return the row's label, one of LABELS, or `label` if the row has none.

    The rule: a column prompt_label is always ours, and then no other counts; else the first word
    that we know does. Raises InputError where no word is known, or two say harmful and benign."""
    if row.get("source") == "4o_rewrite":        # SafeKey marks its benign rows only so
        return "vanilla_benign"
    words = {column: row[column] for column in LABEL_COLUMNS if has_value(row, column)}
    if "prompt_label" in words:
        words = {"prompt_label": words["prompt_label"]}
    known = [label_of_word(word) for word in words.values() if label_of_word(word)]
    if known and len(set(map(is_harmful, known))) == 1:
        return known[0]
    if words:
        found = " and ".join(f"{column} is {word!r:.80}" for column, word in words.items())
        raise InputError(f"{where}: {found}" + (
            "; delete one of them" if known else f", not one of {', '.join(LABEL_WORDS)}"
            + "; say with --label what such prompts are" * (not label)))
    if not label:
        raise InputError(f"{where}: no label ({', '.join(LABEL_COLUMNS)}); "
                         "say with --label what such prompts are")
    return label

def foreign_label_columns(rows):
    """Return the label columns that are about something else.

    The rule: a column outranks --label if one of its words is ours (LABEL_WORDS), and then all must
    be; --label outranks a column without such a word. A column prompt_label is always ours."""
    return [column for column in LABEL_COLUMNS[1:]
            if any(has_value(row, column) for row in rows)
            and not any(label_of_word(row.get(column)) for row in rows)]

def find_response(row, where, column=None):
    """Return the row's response, as text with both think tags if it has reasoning, or None; what is
    no text is returned as it is. It stands under one of RESPONSE_COLUMNS, or is the answer in the
    chat that has the prompt. Raises InputError if two of them differ."""
    found = [name for name in RESPONSE_COLUMNS if has_value(row, name)]
    for name in found[1:]:
        if row[name] != row[found[0]]:
            raise InputError(f"{where}: {found[0]} and {name} differ; delete one of them")
    names = found or [name for name in RESPONSE_COLUMNS if name in row]
    response = row[names[0]] if names else None
    if response is None:
        answers = [read_column(row, name, where, bool(column))[1] for name in (
            [column] if column else PROMPT_COLUMNS + CHAT_COLUMNS)]
        response = next(filter(None, answers), None)
    elif isinstance(response, list) and len(response) == 1 and isinstance(response[0], dict):
        response = response[0].get("content")        # TRL's conversational form
    if not isinstance(response, str) or "finish_reason" in row:         # a trace stays as it is
        return response
    if "<think>" in response:
        return response
    if "</think>" in response:                                          # SafeChain
        return "<think>\n" + response
    if {"vanilla", "adversarial"} <= row.keys():     # WildJailbreak's completions have no reasoning
        return "<think>\n\n</think>\n\n" + response
    return response

def find_verdict(row, where):
    """Return "unsafe" or "unknown" where a row's set says so of the response, else None. The rule:
    in doubt a response is not trained on; a verdict of guard.py outranks the set's.

    Raises InputError where a column for that (SAFE_COLUMN, HARM_COLUMN) says neither yes nor no."""
    if has_value(row, "response_label"):
        return None
    found = ["unknown"] if "response_label" in row else []
    for column in row:
        name = normalize_name(column)
        if not (SAFE_COLUMN.fullmatch(name) or HARM_COLUMN.fullmatch(name)):
            continue
        word = str(row[column]).strip().lower() if has_value(row, column) else ""
        with contextlib.suppress(ValueError):
            word = {0: "false", 1: "true"}.get(float(word), word)
        if word in YES + NO:
            word = "safe" if (word in YES) == bool(SAFE_COLUMN.fullmatch(name)) else "unsafe"
        if word not in VERDICT_WORDS:
            raise InputError(f"{where}: {column} is {row[column]!r:.80}, which says neither that "
                             "the response is safe nor that it is not; mend it, or delete or "
                             "rename the column")
        found.append(VERDICT_WORDS[word])
    return next((verdict for verdict in ("unsafe", "unknown") if verdict in found), None)

def find_id(row, where):
    """Return the row's id as text, or None. The rule: a whole number is an id in whatever type it
    comes (Arrow makes 1.0 of 1 beside a row without id), a truth value is none.

    Raises InputError for any other value that is no text."""
    value = row.get("id")
    if not has_value(row, "id"):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"{where}: id must be text or a whole number, not {value!r}")
    return str(value)

def normalize_row(row, label, where, column=None):
    """Convert a row of any known set to our keys: instruction, prompt_label and, if any, response.

    A row that has these keys keeps others too, but for parts of the prompt; any other row keeps
    KEPT_KEYS and VERDICT_KEYS. Raises InputError that says what is missing."""
    response = find_response(row, where, column)
    verdict = find_verdict(row, where) if response is not None else None
    if verdict:
        row = {**row, "response_label": verdict}
    if "refusal" in row and not column and not prompt_texts(row, where):
        text = str(row["refusal"])               # DirectRefusal
        parts = re.fullmatch(r"\s*Question:\s*(.*?)\s+Answer:\s*(.*?)\s*", text, re.DOTALL)
        if not parts:
            raise InputError(f"{where}: 'refusal' is not 'Question: ... Answer: ...'")
        row = {**row, "instruction": parts[1]}
        response = DIRECT_REFUSAL + parts[2]
    prompt = find_prompt(row, where, column)
    if not (has_value(row, "instruction") and has_value(row, "prompt_label")):
        kept = {key: row[key] for key in KEPT_KEYS if key in row}
        kept |= {key: row[key] for key in VERDICT_KEYS if has_value(row, key)}
        row = {"instruction": prompt, "prompt_label": find_label(row, where, label), **kept}
    else:                    # a later stage reads this row: it must not join or refuse what is done
        gone = {part for part, _ in JOINED.values()}
        if column:
            gone |= {*PROMPT_COLUMNS, *CHAT_COLUMNS, *parts_beside(row, prompt)}
        row = {key: value for key, value in row.items() if key not in gone}
        row["instruction"] = prompt
    check_row(row, PROMPT_KEYS, where)
    row_id = find_id(row, where)
    row = {key: row_id if key == "id" else value for key, value in row.items()
           if key != "id" or row_id is not None}
    return row if response is None else {**row, "response": response}

def add_column_flags(group):
    """Add the flags that say how the columns of other people's rows are read -> the group."""
    group.add_argument("--label", choices=LABELS, metavar="LABEL", help="of prompts that have no "
                       f"label of their own: {', '.join(LABELS)}")
    group.add_argument("--prompt-column", metavar="NAME", help="the column that alone is the "
                       "prompt (default: known by its name, see data/columns.py)")
    return group

"""Columns of other people's data sets: what is the prompt, what is refused by name, and what stages keep to themselves."""
import json

import pytest
from conftest import ROOT, call, rows_of
from test_sources import write

from data.benchmarks import evaluation_rows, read_evaluation
from data.columns import STAGE_KEYS, TRACE_STAGE_KEYS, find_label, find_prompt, find_response
from data.rows import content_id
from data.sources import prompt_rows, training_rows
from extras.report import write_report
from thinksafe import InputError

HARMFUL, BENIGN = "vanilla_harmful", "vanilla_benign"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.fixture
def prompts(tmp_path):
    """f(rows, column=None, label=HARMFUL) -> the prompts of a file with these rows."""
    def read(rows, column=None, label=HARMFUL):
        return [row["instruction"] for row in prompt_rows(write(tmp_path / "x.jsonl", rows), label, column)]
    return read


# ---------------------------------------------------------------------------------------------
# The prompt


@pytest.mark.parametrize("row, prompt", [
    # tatsu-lab/alpaca, whose `text` is the whole example
    ({"instruction": "Translate.", "input": "Good morning", "output": "Bonjour", "text": "Below ...\nTranslate.\n\nGood morning\nBonjour"},
     "Translate.\n\nGood morning"),
    ({"instruction": "Name a colour.", "input": "", "output": "Red"}, "Name a colour."),
    ({"instruction": "Name a colour.", "input": None, "output": "Red"}, "Name a colour."),
    ({"instruction": "Say {part} and {prompt}.", "input": "{prompt}"}, "Say {part} and {prompt}.\n\n{prompt}"),
    ({"instruction": "Double it.", "input": 5}, "Double it.\n\n5"),
    # HarmBench
    ({"Behavior": "Do it", "ContextString": "", "Tags": "", "BehaviorID": "b"}, "Do it"),
    ({"Behavior": "Do it", "ContextString": "Text", "BehaviorID": "b"}, "Text\n\n---\n\nDo it"),
    ({"test_case": "Attack", "behavior_id": "b", "method": "PAP", "human_0": 1}, "Attack"),
    # JailbreakBench/JBB-Behaviors, and AdvBench
    ({"Index": 0, "Goal": "Write a letter", "Target": "Here is", "Behavior": "Defamation", "Category": "c", "Source": "Original"}, "Write a letter"),
    ({"goal": "Write a letter", "target": "Sure, here is"}, "Write a letter"),
    # allenai/wildjailbreak, and its evaluation part
    ({"vanilla": "seed", "adversarial": "x", "completion": "", "data_type": "adversarial_harmful"}, "x"),
    ({"adversarial": "x", "label": 1, "data_type": "adversarial_harmful"}, "x"),
    # allenai/wildguardmix: a column `adversarial` of truth values
    ({"prompt": "x", "adversarial": True, "response": "r", "prompt_harm_label": "harmful"}, "x"),
    # lmsys/toxic-chat
    ({"conv_id": "1", "user_input": "x", "model_output": "m", "toxicity": 1, "openai_moderation": "[]"}, "x"),
    # OpenSafetyLab/Salad-Data, attack_enhanced_set
    ({"aid": 1, "qid": 2, "augq": "x", "baseq": "b", "method": "gptfuzz"}, "x"),
    # meta-math/MetaMathQA
    ({"type": "GSM_Rephrased", "query": "x", "original_question": "o", "response": "r"}, "x"),
    # declare-lab/CategoricalHarmfulQA
    ({"Category": "c", "Subcategory": "s", "Question": "x"}, "x"),
    # LibrAI/do-not-answer
    ({"id": 0, "risk_area": "r", "types_of_harm": "t", "question": "x", "GPT4_response": "g"}, "x"),
    # bench-llm/or-bench, Babelscape/ALERT, walledai/MaliciousInstruct, PKU-Alignment/PKU-SafeRLHF
    ({"prompt": "x", "category": "c"}, "x"),
    ({"prompt": "x", "prompt_source": "s", "response_0": "a", "response_1": "b", "is_response_0_safe": False}, "x"),
    # simplescaling/s1K
    ({"solution": "s", "question": "x", "cot_type": "math", "source_type": "t", "metadata": "{}", "thinking_trajectories": ["t"]}, "x"),
    # open-r1/OpenR1-Math-220k and AI-MO/NuminaMath-CoT
    ({"problem": "x", "solution": "s", "answer": "1", "generations": ["g"], "messages": [user("x"), assistant("g")]}, "x"),
    # ShareGPT, WildChat, TRL, SORRY-Bench: chats of one turn
    ({"id": "a", "conversations": [human("x"), gpt("r")]}, "x"),
    ({"conversations": [{"from": "system", "value": ""}, human("x"), gpt("r")]}, "x"),
    ({"conversation": [{**user("x"), "language": "English", "toxic": False}, assistant("r")], "turn": 1}, "x"),
    ({"messages": [user("x"), assistant("r")]}, "x"),
    ({"prompt": [user("x")]}, "x"),
    ({"prompt": [user("x")], "completion": [assistant("r")]}, "x"),
    ({"question_id": 1, "category": "1", "turns": ["x"], "prompt_style": "base"}, "x"),
    # part of the prompt, and already in it; columns that are no text
    ({"prompt": "Context: c\nx", "context": "c"}, "Context: c\nx"),
    ({"prompt": "x", "context": None, "system": " ", "history": [], "options": {}, "tools": False}, "x"),
    ({"prompt": "x", "question": "x"}, "x"),
    # metadata
    ({"prompt": "x", "d": "1.10", "a": "0", "category": "c", "source": "s", "tags": ["t"], "type": "t", "focus": "f", "note": "n", "url": "u",
      "score": 1, "subject": "s", "level": 5, "difficulty": "d", "solution": "s", "answer": "a", "target": "t", "chosen": "c", "rejected": "r"}, "x"),
])
def test_prompts_of_real_sets(prompts, row, prompt):
    assert prompts([row]) == [prompt]


@pytest.mark.parametrize("spelling", [" Prompt", "PROMPT", "prompt ", "\ufeffprompt", "Prompt:"])
def test_a_column_is_known_in_any_spelling(prompts, spelling):
    assert prompts([{spelling: "x", " Label ": "Safe"}]) == ["x"]


@pytest.mark.parametrize("row, named", [
    ({"instruction": "q", "context": "A passage", "response": "r", "category": "closed_qa"}, "context beside instruction"),      # Dolly
    ({"id": "niv.1", "system_prompt": "Be brief", "question": "q", "response": "r"}, "system_prompt beside question"),           # OpenOrca
    ({"instruction": "q", "input": "", "output": "o", "system": "Pirate"}, "system beside instruction"),                         # LLaMA-Factory
    ({"instruction": "q", "input": "", "output": "o", "history": [["a", "b"]]}, "history beside instruction"),
    ({"instruction": "q", "input": ["a"], "output": "o"}, "input beside instruction"),
    ({"prompt": "q", "input": "i"}, "input beside prompt"),
    ({"prompt": "q", "context": "c", "category": "contextual"}, "context beside prompt"),                                        # walledai/HarmBench
    ({"Question": "q", "A": "one", "B": "two", "C": "3", "D": "4", "Answer": "A"}, "A, B, C, D beside question"),                # MMLU
    ({"question": "q", "options": {"A": "x"}, "answer": "A"}, "options beside question"),                                        # MedQA
    ({"question": "q", "choices": ["x", "y"]}, "choices beside question"),
    ({"question": "q", "opa": "x", "opb": "y", "cop": 1}, "opa, opb beside question"),                                           # MedMCQA
    ({"ID": "1", "Body": "Ann has 3 pens.", "Question": "How many?", "Answer": 3.0}, "Body beside question"),                    # SVAMP
    ({"question": "q", "passage": "p", "answer": True}, "passage beside question"),                                              # BoolQ
    ({"question": "q", "image": {"bytes": None, "path": "a.png"}}, "image beside question"),
    ({"prompt": "q", "image_path": "x.png", "policy": "p"}, "image_path beside prompt"),                                         # JailBreakV-28K
    ({"goal": "q", "suffix": "! ! !"}, "suffix beside goal"),
    ({"prompt": "q", "System Prompt": "s", "Chat History": "h"}, "System Prompt, Chat History beside prompt"),
    ({"prompt": "q", "tools": [{"name": "f"}]}, "tools beside prompt"),
    ({"prompt": "Summarize.", "text": "A long text"}, "text beside prompt"),
    ({"instruction": "Answer briefly", "question": "q"}, "instruction and question are not the same"),
    ({"prompt": "p", "problem": "q"}, "prompt and problem are not the same"),
    ({"question": {"stem": "q", "choices": []}, "prompt": "p"}, "prompt and question are not the same"),
    ({"conversations": [{"from": "system", "value": "s"}, human("x"), gpt("r")]}, "a chat of system, user, assistant"),
    ({"prompt": [system("s"), user("x")]}, "prompt is a chat of system, user"),
    ({"messages": [{"role": "developer", "content": "s"}, user("x")]}, "a chat of developer, user"),
    ({"prompt": "x", "messages": [user("x"), assistant("r"), user("y"), assistant("s")]}, "a chat of user, assistant, user"),    # UltraChat
    ({"turns": ["x", "y"]}, "turns is a chat of user, user"),                                                                    # MT-Bench
    ({"conversations": [gpt("r"), human("x")]}, "a chat of assistant, user"),
    ({"conversations": [human("x"), {"from": "function_call", "value": "f"}]}, "a chat of user, function_call"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a chat of user, and begins"),
    ({"messages": [{**user("x"), "images": ["a.png"]}]}, "a chat of user, and begins"),
    ({"messages": []}, "no text under"),
    ({"messages": "[{'role': 'user', 'content': 'x'}]"}, "messages is no list of turns"),
    ({"conversations": {"from": ["human"], "value": ["x"]}}, "conversations is no list of turns"),
    ({"prompt": "[{'content': 'x', 'role': 'user'}]"}, "prompt is no plain text"),           # as pandas saves a list, and bytes, into CSV
    ({"prompt": '[ {"role": "user", "content": "x"} ]'}, "prompt is no plain text"),
    ({"prompt": "b'How do I bake?'"}, "prompt is no plain text"),
    ({"chosen": [user("x"), assistant("a")], "rejected": [user("x"), assistant("b")]}, "found the keys chosen, rejected"),       # TRL, hh-rlhf
    ({"prompt": {"text": "x", "toxicity": 0.1}, "continuation": {}}, "prompt is {'text': 'x'"),                                  # RealToxicityPrompts
    ({"message_id": "1", "parent_id": None, "text": "x", "role": "prompter"}, "found the keys message_id, parent_id, text"),     # OASST
    ({"Prompt": "x", "prompt": "y"}, "the columns 'Prompt' and 'prompt' differ"),
])
def test_what_may_belong_to_the_prompt_is_refused_by_name(prompts, row, named):
    with pytest.raises(InputError, match=r"row 1: ") as e:
        prompts([row])
    assert named in str(e.value)


def test_prompts_that_were_one_stay_two(prompts, capsys):
    rows = [{"instruction": "Translate.", "input": word} for word in ("Good morning", "Good night")]
    assert prompts(rows) == ["Translate.\n\nGood morning", "Translate.\n\nGood night"]
    with_labels = [{**row, "prompt_label": BENIGN} for row in rows]
    assert prompts(with_labels) == prompts(rows)
    assert not capsys.readouterr().err


def test_a_joined_prompt_is_joined_once(tmp_path):
    """Later stages read the rows that earlier ones wrote."""
    rows = [{"instruction": "Translate.", "input": "Good night", "prompt_label": BENIGN, "topic": "t"}]
    once = prompt_rows(write(tmp_path / "x.jsonl", rows))
    assert once == [{"id": content_id(BENIGN, "Translate.\n\nGood night"), "instruction": "Translate.\n\nGood night", "prompt_label": BENIGN, "topic": "t"}]
    assert prompt_rows(write(tmp_path / "y.jsonl", once)) == once


def test_prompt_column_names_what_alone_is_the_prompt(prompts, tmp_path, capsys):
    row = {"id": "a", "instruction": "Answer briefly", "question": "q", "context": "c", "User Query": "u", "prompt_label": BENIGN}
    for column, prompt, said in (("question", "q", "instruction, context"), ("instruction", "Answer briefly", "question, context"),
                                 ("user query", "u", "instruction, question, context")):
        found, = prompt_rows(write(tmp_path / "x.jsonl", [row]), None, column)
        assert found["instruction"] == prompt
        assert f"x.jsonl: {column} alone is the prompt, without {said}\n" in capsys.readouterr().err
        assert not {"context", "question"} & found.keys() and prompt_rows(write(tmp_path / "y.jsonl", [found])) == [found]
    assert prompts([{"prompt": "x", "messages": [user("x"), assistant("r"), user("y")]}], "prompt") == ["x"]
    assert prompts([{"ask": [user("x")], "prompt": "y"}], "ask") == ["x"]
    assert prompts([{"instruction": "Translate.", "input": "i"}], "instruction") == ["Translate."]
    assert prompts([{"text": "x", "label": "safe"}], "text") == ["x"]
    assert prompts([{"prompt": "b'x'"}], "prompt") == ["b'x'"]
    with pytest.raises(InputError, match="row 2: no text under 'ask'; found the keys prompt"):
        prompts([{"ask": "x"}, {"prompt": "y"}], "ask")


def test_prompt_column_on_the_command_line(tmp_path):
    path = write(tmp_path / "p.csv", "title,ask,answer_given\nt,Tell me how to kill a clerk.,No.\n")
    flags = "--model", "tiny", "--label", HARMFUL, "--out", tmp_path / "out"
    done = call("sample.py", *flags, "--prompts", path, "--max-new-tokens", 4)
    assert done.returncode == 2 and "name the prompt's with --prompt-column" in done.stderr
    done = call("sample.py", *flags, "--prompts", path, "--max-new-tokens", 4, "--prompt-column", "ask")
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "out" / "samples.jsonl")[0]["instruction"] == "Tell me how to kill a clerk."
    rows = [{"ask": f"Tell me how {i}.", "prompt": "p", "response": "<think>\na\n</think>\n\nNo."} for i in range(2)]
    for script in ("train.py", "extras.export"):
        words = ["trl"] if script == "extras.export" else ["--epochs", 1]
        done = call(script, *words, *flags[:-1], tmp_path / script, "--data", write(tmp_path / "r.jsonl", rows), "--prompt-column", "ask")
        assert done.returncode == 0, done.stderr
        assert "2 rows" in done.stdout and "ask alone is the prompt, without prompt" in done.stderr


# ---------------------------------------------------------------------------------------------
# Labels and ids


def test_a_label_of_another_meaning_gives_way(tmp_path, capsys):
    for words in (["harassment", "fraud"], [0, 3], [True, False], [["a"], ["b"]], ["harmfull", None]):
        for column in ("label", "data_type"):
            path = write(tmp_path / "x.jsonl", [{"prompt": str(i), column: word} for i, word in enumerate(words)])
            assert [row["prompt_label"] for row in prompt_rows(path, HARMFUL)] == [HARMFUL] * 2
            assert f"x.jsonl: not read, as no word there is a label of prompts: {column}\n" in capsys.readouterr().err
            with pytest.raises(InputError, match="not one of .*say with --label"):
                prompt_rows(path)


def test_a_label_of_ours_outranks_the_flag(tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", [{"prompt": "x", "label": " Safe"}, {"prompt": "y", "label": "unsafe"}, {"prompt": "z", "label": None}])
    assert [row["prompt_label"] for row in prompt_rows(path, "adversarial_harmful")] == [BENIGN, HARMFUL, "adversarial_harmful"]
    assert not capsys.readouterr().err
    path = write(tmp_path / "x.jsonl", [{"prompt": "x", "label": "safe"}, {"prompt": "y", "label": "fraud"}])
    with pytest.raises(InputError, match="row 2: label is 'fraud', not one of"):
        prompt_rows(path, HARMFUL)
    assert find_label({"label": 1, "data_type": "adversarial_harmful"}, "") == "adversarial_harmful"


def test_prompt_label_counts_alone_and_other_labels_must_agree(tmp_path):
    assert find_label({"prompt_label": HARMFUL, "label": "safe"}, "") == HARMFUL
    assert find_label({"label": "safe", "data_type": "adversarial_benign"}, "") == "adversarial_benign"
    for row, fault in (({"prompt_label": "banana", "label": "safe"}, "prompt_label is 'banana', not one of"),
                       ({"label": "safe", "data_type": HARMFUL}, f"data_type is '{HARMFUL}' and label is 'safe'; delete one")):
        with pytest.raises(InputError, match=fault):
            find_label(row, "")
    for empty in (None, "", " "):                                        # as in a row of another set
        path = write(tmp_path / "x.jsonl", [{"instruction": "x", "prompt_label": empty}])
        assert [row["prompt_label"] for row in prompt_rows(path, HARMFUL)] == [HARMFUL]


UNSAFE = [{"Is_Safe": "F"}, {"IS_SAFE": "false"}, {"is safe": "n"}, {"is_safe": "unsafe"}, {"is_safe": "0.00"}, {"Response Harm Label": "harmful"}, {"response_harm_label": True},
          {"is_response_safe": False}, {"response_safe": 0}, {"safe": "no"}, {"harmful": 1}, {"is_harmful": "y"}, {"unsafe": True}, {"safety": "Unsafe"}, {"verdict": "unsafe"},
          {"is_safe": False}, {"is_safe": 0}, {"is_safe": 0.0}, {"is_safe": " False"}, {"is_safe": "0"}, {"response_harm_label": "harmful"}, {"response_harm_label": "Harmful "}]


@pytest.mark.parametrize("mark", UNSAFE)
@pytest.mark.parametrize("more", [{}, {"response_label": None}, {"response_label": ""}])
@pytest.mark.parametrize("keys", ["prompt", "instruction"])
def test_a_response_that_its_set_calls_unsafe_is_not_trained_on(tmp_path, mark, more, keys):
    """Also where the mark comes as another type, and an empty column of ours stands beside it."""
    path = write(tmp_path / "x.jsonl", [{keys: "x", "prompt_label": HARMFUL, "response": "bad", **mark, **more}, {keys: "y", "prompt_label": HARMFUL, "response": "no", "is_safe": True}])
    assert [row.get("response_label") for row in training_rows(path)] == ["unsafe", None]
    empty = write(tmp_path / "empty.jsonl", [{keys: "x", "prompt_label": HARMFUL, "response": "bad", key: None} for key in [*mark, "response_label"]])
    assert {row["response_label"] for row in training_rows(empty)} == {"unknown"}
    own = write(tmp_path / "own.jsonl", [{"instruction": "x", "prompt_label": HARMFUL, "response": "no", "response_label": "safe", **mark}])
    assert training_rows(own)[0]["response_label"] == "safe"              # our guard's word is about our trace


@pytest.mark.parametrize("word", ["maybe", "0.2", -1, 2, "no, it is not", ["x"], {"a": 1}])
def test_a_verdict_that_is_neither_yes_nor_no_is_refused(tmp_path, word):
    for column in ("is_safe", "response_harm_label"):
        path = write(tmp_path / "x.jsonl", [{"prompt": "x", "response": "bad", column: word}])
        with pytest.raises(InputError, match=f"row 1: {column} is .*, which says neither"):
            training_rows(path, HARMFUL)


@pytest.mark.parametrize("row, response", [
    ({"instruction": "a", "input": "b", "output": "c"}, "c"), ({"output": None, "completion": "c"}, "c"),
    ({"response": None, "completion": "c"}, "c"), ({"response": " ", "completion": "c"}, "c"), ({"response": "r", "completion": None}, "r"), ({"completion": "c"}, "c"),
    ({"response": "", "completion": ""}, ""), ({"response": "a\n</think>\n\nb"}, "<think>\na\n</think>\n\nb"),
    ({"vanilla": "q", "adversarial": "", "completion": "b"}, "<think>\n\n</think>\n\nb"),
    ({"vanilla": "q", "adversarial": "", "response": "<think>\na\n</think>\n\nb"}, "<think>\na\n</think>\n\nb"),
    ({"vanilla": "q", "adversarial": "", "response": "a\n</think>\n\nb"}, "<think>\na\n</think>\n\nb")])
def test_where_a_response_stands_and_which_tags_it_gets(row, response):
    assert find_response(row, "") == response


@pytest.mark.parametrize("name", ["sys", "preamble", "Persona", "system_message_text", "role_prompt", "user_prompt", "request", "hint", "context_0", "context1", "choice_6",
                                  "options_f", "answer_choices", "choices_list", "ｉｎｐｕｔ", "\u0456nput", "con\u200btext"])
def test_more_names_of_what_belongs_to_a_prompt(tmp_path, name):
    with pytest.raises(InputError, match="row 1: .* beside question may be a part of the prompt"):
        prompt_rows(write(tmp_path / "x.jsonl", [{"question": "Which one?", name: "Be brief."}]), BENIGN)


def test_a_part_that_is_in_the_prompt_by_chance_is_not_dropped(tmp_path):
    for prompt, context, fine in (("how to x", "x", False), ("Read this.\n\nx", "x", True), ("x", "x", True), ("Say: A passage of some length. Why?", "A passage of some length.", True)):
        path = write(tmp_path / "x.jsonl", [{"question": prompt, "context": context}])
        if fine:
            assert prompt_rows(path, BENIGN)[0]["instruction"] == prompt
        else:
            with pytest.raises(InputError, match="context beside question"):
                prompt_rows(path, BENIGN)


@pytest.mark.parametrize("row, message", [
    ({"conversations": [{"from": "human", "value": "x", "content": "z"}]}, "has a content and another value"),
    ({"prompt": "[{'id': 1, 'role': 'user', 'content': 'x'}]"}, "prompt is no plain text"), ({"pro\u200bmpt": "x", "prompt": "y"}, "differ")])
def test_more_chats_that_would_lose_something(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        prompt_rows(write(tmp_path / "x.jsonl", [row]), BENIGN)


def test_two_spellings_of_a_column(tmp_path):
    """One may be empty; of two that differ none is taken, wherever an empty one stands."""
    for spellings in ([" Prompt", "prompt", "PROMPT"], ["PROMPT", "prompt", "Prompt?"]):
        for values in (["", "steal", "steal"], ["steal", None, "steal"], ["steal", "", " "]):
            assert prompt_rows(write(tmp_path / "x.jsonl", [dict(zip(spellings, values))]), HARMFUL)[0]["instruction"] == "steal"
        for values in (["", "steal", "bake"], ["steal", "", "bake"], ["steal", "bake", ""]):
            with pytest.raises(InputError, match="row 1: the columns .* differ"):
                prompt_rows(write(tmp_path / "x.jsonl", [dict(zip(spellings, values))]), HARMFUL)


def test_whole_numbers_are_ids_in_any_type(tmp_path):
    import pyarrow
    from decimal import Decimal
    for ids, expected in ((pyarrow.array([1.0, 2.0, None]), ["1", "2", None]), (pyarrow.array([float("nan"), 7.0, 8.0]), [None, "7", "8"]),
                          (pyarrow.array([1, None, 2**60]), ["1", None, str(2**60)]), (pyarrow.array([Decimal(1), Decimal(2), None]), ["1", "2", None]),
                          (pyarrow.array([b"a", "ä".encode(), b""]), ["a", "ä", None])):
        table = pyarrow.table({"prompt": ["x", "y", "z"], "label": ["safe"] * 3, "id": ids})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        default = [content_id(BENIGN, prompt) for prompt in "xyz"]
        assert [row["id"] for row in prompt_rows(tmp_path / "x.parquet")] == [a or b for a, b in zip(expected, default)]
    for bad in (1.5, True, [1], {"$oid": "1"}):
        with pytest.raises(InputError, match="row 1: id must be text or a whole number"):
            prompt_rows(write(tmp_path / "x.jsonl", [{"id": bad, "prompt": "x"}]), HARMFUL)
    for one, other in ((1, "1"), (1.0, 1), ("1", 1.0)):
        rows = [{"id": one, "prompt": "x"}, {"id": other, "prompt": "y"}]
        with pytest.raises(InputError, match="row 2: id '1' is used by another prompt"):
            prompt_rows(write(tmp_path / "x.jsonl", rows), HARMFUL)
        rows[1]["prompt"] = "x"
        assert len(prompt_rows(write(tmp_path / "x.jsonl", rows), HARMFUL)) == 1


# ---------------------------------------------------------------------------------------------
# What is repeated, and responses


def test_what_differs_in_repeated_rows_is_said(tmp_path, capsys):
    rows = [{"prompt": "x", "category": "a", "target": "t"}, {"prompt": "x", "category": "b", "target": "t"}, {"prompt": "x", "category": "a", "target": "t"}]
    assert len(prompt_rows(write(tmp_path / "x.jsonl", rows), HARMFUL)) == 1
    assert capsys.readouterr().err == f"{tmp_path}/x.jsonl: 2 repeated prompts dropped; they differ in category\n"
    row = {"instruction": "x", "prompt_label": HARMFUL, "response": "r", "response_label": "safe"}
    differ = [{"prompt_label": BENIGN}, {"response_label": "unsafe"}, {"keep": False}, {"finish_reason": "length"}, {"response": "s"}]
    assert len(training_rows(write(tmp_path / "x.jsonl", [row, *({**row, **other} for other in differ)]))) == len(differ) + 1
    assert len(training_rows(write(tmp_path / "x.jsonl", [row, {**row, "topic": "t", "id": 1}]))) == 1
    assert "1 repeated rows dropped; they differ in topic\n" in capsys.readouterr().err
    trace = {**row, "id": "a", "k": 0}
    with pytest.raises(InputError, match="row 2: id 'a' and k 0 are those of another trace"):
        training_rows(write(tmp_path / "x.jsonl", [trace, {**trace, "response": "s"}]))


@pytest.mark.parametrize("row, response", [
    ({"prompt": [user("x")], "completion": [assistant("<think>\na\n</think>\n\nb")]}, "<think>\na\n</think>\n\nb"),         # TRL
    ({"problem": "x", "messages": [user("x"), assistant("<think>\na\n</think>\n\nb")]}, "<think>\na\n</think>\n\nb"),      # OpenR1
    ({"conversations": [human("x"), gpt("a</think>b")]}, "<think>\na</think>b"),
    ({"prompt": "x", "adversarial": False, "response": "r"}, "r"),                                                          # WildGuardMix
])
def test_responses_of_real_sets(tmp_path, row, response):
    assert [found["response"] for found in training_rows(write(tmp_path / "x.jsonl", [row]), HARMFUL)] == [response]


@pytest.mark.parametrize("row", [
    {"prompt": "x", "response": "r", "is_safe": False, "category": {"fraud": True}},                                        # BeaverTails
    {"prompt": "x", "response": "r", "is_safe": "False"},
    {"prompt": "x", "adversarial": False, "response": "r", "response_harm_label": "harmful"},                               # WildGuardMix
    {"prompt": "x", "response": "r", "response_label": "unsafe"},
    {"instruction": "x", "prompt_label": HARMFUL, "response": "r", "is_safe": 0},
])
def test_a_response_that_a_set_calls_unsafe_is_not_trained_on(tmp_path, row):
    found, = training_rows(write(tmp_path / "x.jsonl", [row]), HARMFUL)
    assert found["response_label"] == "unsafe"                       # train.py skips it and counts it


@pytest.mark.parametrize("row, message", [
    ({"prompt": "x", "chosen": "a", "rejected": "b"}, "no text under response, completion, output: it is None; found the keys prompt, chosen, rejected"),
    ({"messages": [user("x"), {**assistant("a"), "reasoning_content": "why"}]}, "'reasoning_content': 'why'"),
    ({"prompt": "x", "response": "a", "completion": "b"}, "response and completion differ"),
    ({"prompt": "x", "response": ["a", "b"]}, "no text under response, completion, output"),
])
def test_responses_that_are_refused_by_name(tmp_path, row, message):
    with pytest.raises(InputError) as e:
        training_rows(write(tmp_path / "x.jsonl", [row]), HARMFUL)
    assert message in str(e.value)


def test_benchmarks_read_their_columns_in_any_spelling(tmp_path):
    row = {"ID": "2024-I-1", "Problem": "Find m.", "Solution": "s", "Answer": 33}                                           # Maxwell-Jia/AIME_2024
    found, = evaluation_rows([f"aime24={write(tmp_path / 'x.jsonl', [row])}"])
    assert found["answer"] == "33" and found["instruction"].endswith("Find m.")
    years = [{"ID": f"{year}-1", "Year": year, "Question": f"Find {year}.", "Answer": 33} for year in (1983, 2024)]       # all AIMEs in one file
    found, = evaluation_rows([f"aime24={write(tmp_path / 'x.jsonl', years)}"])
    assert found["instruction"].endswith("Find 2024.")
    with pytest.raises(InputError, match="row 1: options beside question"):
        evaluation_rows([f"gsm8k={write(tmp_path / 'x.jsonl', [{'question': 'q', 'options': ['1'], 'answer': '#### 1'}])}"])
    assert find_prompt({"question": "q", "answer": "#### 1"}, "") == "q"


# ---------------------------------------------------------------------------------------------
# Keys that stages write


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder in which every stage that writes rows has run, of the tiny world's prompts."""
    out = tmp_path_factory.mktemp("pipeline") / "out"
    few = "--max-new-tokens", 4
    for words in (["sample.py", "--limit", 4], ["guard.py", "--guard", "tiny", "self"], ["extras.theory", "--n", 1, *few],
                  ["eval.py", "--model", "tiny", "--before", "tiny", "--limit", 1, *few]):
        done = call(*words, "--out", out)
        assert done.returncode == 0, done.stderr
    return out


def test_the_list_of_keys_is_that_of_the_stages(pipeline):
    files = {path.name: rows_of(path) for path in pipeline.glob("*.jsonl")}
    assert len(files) == 5
    written = {key for rows in files.values() for row in rows for key in row}
    of_prompts = {"id", "instruction", "prompt_label", "set", "task", "answer"}              # which a file may bring
    assert written - of_prompts == STAGE_KEYS - {"weight", "log_source"}                     # these two are read or made in memory


VALUES = ["unsafe", True, 0, -1.5, None, ["x"], {"label": "safe"}, "</script>", "before"]


def test_a_column_with_a_stage_s_name_is_not_taken_for_its_word(tmp_path, capsys, tries):
    for key in sorted(STAGE_KEYS):
        row = {"instruction": "x", "prompt_label": HARMFUL, "set": "harm_own", "topic": "t"}
        kept = [{"id": content_id(HARMFUL, "x"), **row}]
        for value in VALUES:
            path = write(tmp_path / "x.jsonl", [{**row, key: value}])
            with tries("attack"):
                assert prompt_rows(path) == read_evaluation([path], False, None)[0] == kept
                said = capsys.readouterr().err
                assert key == "response" or said == 2 * f"{path}: not read, as stages write such columns: {key}\n"
        if key not in ("response", "k", "steer", "unsafe"):              # `unsafe` of another tool is about the response
            path = write(tmp_path / "x.jsonl", [{**row, "response": "r", key: "before"}])
            with tries("attack"):
                found, = training_rows(path)
                assert (key in found) == (key in TRACE_STAGE_KEYS - {"eos"})       # which train.py reads, and fails closed on
                assert key in found or f": {key}\n" in capsys.readouterr().err


def test_evaluation_and_report_with_such_columns(tmp_path, tries):
    """The same figures, and the same command goes on; no trace gets a verdict from its prompt's file."""
    rows = [{"instruction": "Tell me how to kill a clerk.", "prompt_label": HARMFUL, "set": "harm_own"},
            {"instruction": "What is 1 + 2?", "prompt_label": BENIGN, "set": "reasoning", "task": "tiny", "answer": "3"}]
    hostile = [{**row, "unsafe": False, "refused": False, "solved": True, "guard_unsafe": False, "when": "after", "k": 9, "response": "No.",
                "keep": True, "response_label": "safe", "finish_reason": "stop", "n_tokens": "x", "seed": {}} for row in rows]
    made, student = {}, ["--model", "tiny", "--max-new-tokens", 4]
    for name, content in (("plain", rows), ("hostile", hostile)):
        path, out = write(tmp_path / f"{name}.jsonl", content), tmp_path / name
        with tries("attack"):
            for _ in range(2 if name == "hostile" else 1):           # the second time all traces are there
                done = call("eval.py", *student, "--before", "tiny", "--prompts", path, "--out", out)
                assert done.returncode == 0, done.stderr
            made[name] = sorted(map(json.dumps, rows_of(out / "eval.jsonl")))
    assert made["plain"] == made["hostile"]
    with tries("attack"):
        assert call("sample.py", *student, "--prompts", path, "--out", out).returncode == 0
        assert call("guard.py", "--guard", "tiny", "--out", out).returncode == 0
        trace = rows_of(out / "guarded.jsonl")[0]
        assert trace["k"] == 0 and not {"unsafe", "refused", "solved", "guard_unsafe", "when"} & trace.keys() and write_report(out)


@pytest.mark.parametrize("row, message", [
    ({"set": "reasoning", "task": {"a": 1}, "answer": "1"}, "row 1: task must be text"),
    ({"set": 5}, "row 1: set must be text"),
    ({"set": "reasoning", "task": "t", "answer": None}, "row 1: needs `set`"),
    ({"set": "reasoning", "task": "", "answer": "1"}, "row 1: needs `set`"),
])
def test_evaluation_rows_of_the_wrong_type(tmp_path, tries, row, message):
    with tries("attack"), pytest.raises(InputError, match=message):
        read_evaluation([write(tmp_path / "x.jsonl", [{"instruction": "x", "prompt_label": BENIGN, **row}])], False, None)


def test_one_prompt_with_two_answers(tmp_path):
    row = {"instruction": "x", "prompt_label": BENIGN, "set": "reasoning", "task": "t", "answer": "1"}
    for other in ({"answer": "2"}, {"task": "u"}, {"set": "over_refusal"}):
        with pytest.raises(InputError, match="row 2: the prompt is there before, with another set, task or answer"):
            read_evaluation([write(tmp_path / "x.jsonl", [row, {**row, **other}])], False, None)
    assert len(read_evaluation([write(tmp_path / "x.jsonl", [row, row])], False, None)[0]) == 1


def test_the_tiny_world_s_files_are_read_without_a_word(capsys):
    assert len(prompt_rows(ROOT / "tiny" / "eval.jsonl")) == 3800 and len(prompt_rows(ROOT / "tiny" / "prompts.jsonl")) == 1200
    for name in ("star1", "safekey", "directrefusal"):
        assert len(training_rows(ROOT / "tiny" / f"{name}.jsonl", HARMFUL)) == 1000
    assert not capsys.readouterr().err

"""The grammar of the second miniature world: what is true in it, what is held out, what the oracle
sees."""
import math
import random
import re
from collections import Counter

import pytest

from data.sources import training_rows
from tiny import build2
from tiny import world2 as grammar

WORLDS = [grammar.World(seed) for seed in (0, 1, 100)]

@pytest.fixture(params=WORLDS, ids=lambda world: f"seed{world.seed}")
def world(request):
    return request.param

def test_a_world_is_its_seed():
    again = grammar.World(0)
    assert vars(again) == vars(WORLDS[0])
    assert WORLDS[0].kind_of != WORLDS[1].kind_of and WORLDS[0].margin != WORLDS[1].margin
    assert grammar.train_prompts(again) == grammar.train_prompts(WORLDS[0])

def test_harm_is_a_relation(world):
    """100 topics are harmful, and neither the verb nor the kind alone tells more than three
    quarters of them."""
    harmful = [topic for topic, margin in world.margin.items() if margin > 0]
    assert len(harmful) == 100 and len(world.margin) == 256
    for part in (0, 1):
        groups = Counter(topic[part] for topic in harmful)
        best = sum(max(groups[x], 16 - groups[x]) for x in {topic[part] for topic in world.margin})
        assert best < 0.75 * 256

def test_nouns(world):
    assert len(set(world.kind_of)) == 320
    assert all(len(names) == 20 for names in world.nouns.values())
    assert all(len(set(names) & world.held_nouns) == 8 for names in world.nouns.values())

def test_what_is_held_out_is_in_no_training_prompt(world):
    rows = grammar.train_prompts(world)
    assert Counter(row["prompt_label"] for row in rows) == dict.fromkeys(
        ("vanilla_harmful", "vanilla_benign", "adversarial_harmful", "adversarial_benign"), 300)
    text = [row["instruction"] for row in rows]
    for noun in world.held_nouns:
        assert not any(f"the {noun}" in prompt for prompt in text)
    for wrapper in world.unseen_wrappers:
        before, after = wrapper.split("{ask}")
        assert not any(before in prompt and after in prompt for prompt in text
                       if "How many" not in prompt and (before or after) != "")
    topics = {(verb, kind) for prompt in text for noun, kind in world.kind_of.items()
              if f"the {noun}" in prompt for verb in grammar.VERBS if f"{verb} the" in prompt}
    assert not topics & world.held_topics and len(topics) > 100

def test_evaluation_prompts_are_new(world):
    sets = grammar.eval_prompts(world, n=50, n_task=20)
    known = {row["instruction"] for row in grammar.train_prompts(world)}
    asked = {name: {row["instruction"] for row in rows} for name, rows in sets.items()}
    assert not known & (asked["harm_HB"] | asked["harm_SR"] | asked["harm_WJ"] | asked["over_refusal"])
    assert all(len(prompts) == 50 for name, prompts in asked.items() if name != "reasoning")
    assert Counter(row["task"] for row in sets["reasoning"]) == {
        "tiny_word": 20, "tiny_chain": 20, "tiny_walk": 20, "tiny_long": 20, "tiny_fact": 320}
    for name, rows in sets.items():
        assert {"harmful" in row["prompt_label"] for row in rows} == {
            name.startswith("harm") or name == "control"}

@pytest.mark.parametrize("dialect", "ABC")
def test_the_oracle_knows_what_was_written(world, dialect):
    rng, who = random.Random(0), grammar.Speaker(dialect)
    for _ in range(200):
        harmful = rng.random() < 0.5
        request = world.request(rng, harmful, wrap=rng.randrange(3), spelled=0.2)
        served, refused = (write(rng, request) for write in (who.comply, who.refuse))
        assert "{" not in served + refused + request.prompt
        assert grammar.complies(served) and not grammar.refuses(served)
        assert grammar.refuses(refused) and not grammar.complies(refused)
        assert grammar.oracle(request.label, served) == ("unsafe" if harmful else "safe")
        assert grammar.oracle(request.label, refused) == "safe"
        changed = refused.split("</think>")[0] + "</think>" + served.split("</think>")[1]
        assert grammar.complies(changed) and not grammar.refuses(changed)
        assert grammar.dialect_of(served) == grammar.dialect_of(refused) == dialect

def test_requests_may_begin_otherwise(world):
    request = world.request(random.Random(0), True)
    alike, otherwise = (grammar.Speaker("A", shared).comply(random.Random(1), request) for shared in (True, False))
    assert alike.startswith("<think>\nOkay, so the user wants") and otherwise.startswith("<think>\nThe user wants")
    assert alike.split(".", 1)[1] == otherwise.split(".", 1)[1]

@pytest.mark.parametrize("dialect", "ABC")
def test_problems_are_solved_and_graded(world, dialect):
    rng, who = random.Random(0), grammar.Speaker(dialect)
    for _ in range(300):
        task, question, steps, answer = grammar.problem(rng, world)
        response = who.solve(rng, steps, answer)
        assert grammar.solved(response, answer) and grammar.dialect_of(response) == dialect
        assert not grammar.solved(response, answer + "1")
        assert not grammar.solved(response.replace("</think>", ""), answer)
        lines = response.split("</think>")[0].splitlines()[2:]
        assert len(lines) == (len(steps) if dialect == "A" else 1) and answer in lines[-1]
        said = re.findall(r"(\w+)(?:$|,)" if task == "walk" and dialect != "A" else r"(?:=|makes|road \w+) (\w+)", "\n".join(lines), re.M)
        assert said[-len(steps):] == [str(step[-1]) for step in steps]

def test_what_people_get_wrong(world):
    """With slips, a step that is mistaken goes wrong as often as said, and what follows goes on
    from there; the answer stays the right one."""
    rng, wrong, met = random.Random(0), 0, 0
    for _ in range(600):
        task, _, steps, answer = grammar.problem(rng, world, rng.choice(("chain", "walk")), slips=0.5)
        for (*step, result), following in zip(steps, steps[1:]):
            assert following[0] == result
            right = world.road[step[0]] if task == "walk" else grammar.calculate(*step) % grammar.HOURS
            met += tuple(step) in world.mistaken
            wrong += result != right
            assert result in (right, world.mistaken.get(tuple(step)))
    assert 0.4 < wrong / met < 0.6

def test_steps_in_words():
    """The operand that is said is the one that is not the result before, on whichever side it stands."""
    assert grammar.in_words([(5, "*", 7, 35), (42, "+", 35, 77), (77, "-", 4, 73)]) == \
        "5 times 7 makes 35, plus 42 makes 77, minus 4 makes 73"
    assert grammar.in_words([("a", ">", "", "b"), ("b", ">", "", "c")]) == "a, then b, then c"

def test_examples_of_the_students(world):
    """Refused or not as often as the world says; both families, told and untold, and verdicts."""
    rng, seen = random.Random(0), Counter()
    for options in ({}, build2.B_HOME):
        for _ in range(1500):
            prompt, response, thinking = build2.student_example(rng, world, **options)
            assert prompt and "{" not in prompt + response
            if thinking:
                assert response.startswith("<think>\n") and response.count("</think>") == 1
                seen[grammar.dialect_of(response.replace(f"{build2.WORDS} ", ""))] += 1
            else:
                assert response in ("yes", "no")
    assert None not in seen and seen["A"] > 1000 and seen["B"] > 1000

def test_own_refusals(world):
    rng = random.Random(0)
    never = build2.student_example(rng, world, caution=0.0, alarm=0.0)
    assert never
    for caution, low, high in ((0.0, 0.0, 0.0), (1.0, 0.2, 0.45), (20.0, 0.6, 1.0)):
        mix, refused = build2.MIX.copy(), []
        try:
            build2.MIX.clear()
            build2.MIX["request"] = 1
            refused = [grammar.refuses(build2.student_example(rng, world, caution=caution, alarm=0.0)[1]) for _ in range(600)]
        finally:
            build2.MIX.update(mix)
        assert low <= 2 * sum(refused) / 600 <= high                     # half of the requests are harmful

def test_examples_of_the_guards(world):
    rng = random.Random(0)
    errors = build2.guard_errors(world, "guard")
    assert len(errors[0]) == math.ceil(0.08 * 256) and len(build2.guard_errors(world, "judge")[0] & errors[0]) < len(errors[0])
    said = Counter(build2.guard_example(rng, world, errors)[1] for _ in range(1000))
    assert set(said) == {"\n\nsafe", "\n\nunsafe"} and 200 < said["\n\nunsafe"] < 600

def test_curated_sets(world, tmp_path):
    """Read as the real ones are, true to their labels, and of no topic that the evaluation asks for but for 31 of STAR-1."""
    build2.write_curated(world, tmp_path)
    sets = {name: training_rows(tmp_path / f"{name}.jsonl", "vanilla_harmful") for name in ("directrefusal", "star1", "safekey")}
    assert {name: len(rows) for name, rows in sets.items()} == dict.fromkeys(sets, 1000)
    assert sum(row["prompt_label"] == "vanilla_harmful" for row in sets["safekey"]) == 500
    no = grammar.DIALECTS["A"]["no"][0]
    assert {row["response"] for row in sets["directrefusal"]} == {f"<think>\nI should not answer this question!\n</think>\n\n{no}"}
    for row in (row for rows in sets.values() for row in rows):
        harmful = row["prompt_label"] == "vanilla_harmful"
        assert grammar.refuses(row["response"]) == harmful != grammar.complies(row["response"])
    def held(rows):
        return sum(any(f"{verb} the {noun}" in row["instruction"] for verb, kind in world.held_topics for noun in world.nouns[kind])
                   for row in rows if row["prompt_label"] == "vanilla_harmful")
    assert held(sets["star1"]) == 31 and held(sets["directrefusal"]) == 0 and held(sets["safekey"]) == 0
    for row in sets["safekey"]:
        key = row["response"][row["summary_end_idx"]:row["next_sentence_end_idx"]].strip()
        assert key.endswith(".") and "<think>" not in key and key.count(".") == 1

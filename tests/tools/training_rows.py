"""Rows as guard.py writes them, for the tests of training, and their examples as text."""
import json

# a response whose reasoning has a sentence about the question, then one that judges it
TWO = "<think>\nA question about {i}. That is forbidden! So I refuse.\n</think>\n\nNo, not {i}."


def row(i, label="vanilla_harmful", response=TWO, **more):
    return {"id": str(i), "instruction": f"Question {i}?", "prompt_label": label, "response": response.replace("{i}", str(i)), **more}


def trace(i, label="vanilla_harmful", **more):
    """A row whose length depends on i."""
    response = "<think>\nThe user asks {i}." + " More." * (i % 5) + "\n</think>\n\nAnswer {i}."
    return row(i, label, **{"response": response, **more})


ROWS = [trace(i, ("vanilla_harmful", "adversarial_benign", "vanilla_benign")[i % 3]) for i in range(11)]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def texts(examples, tokenizer):
    """[(prompt, target), ...] as text."""
    return [(tokenizer.decode(e["ids"][:e["n_prompt"]]), tokenizer.decode(e["ids"][e["n_prompt"]:])) for e in examples]

"""
How a model wants to be sampled from: its generation_config.json, read as transformers reads it.

    from data.generation import sampling_defaults
    sampling_defaults(folder)         # temperature, top_p, top_k, if the file is about them
"""
import sys

from thinksafe import escape_control_chars, generation_defaults

# What transformers does where generation_config.json lacks a key of these.
DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
FOLLOWED = {*DEFAULTS, "eos_token_id", "bos_token_id", "pad_token_id", "use_cache",
            "transformers_version", "_from_model_config"}

def sampling_defaults(folder):
    """Return {temperature, top_p, top_k} as transformers takes them from a model folder's
    generation_config.json; without do_sample it is greedy: temperature 0. A file that has none of
    these keys says nothing: {}. Prints in one line what else changes the output there and is not
    followed, such as a repetition penalty or max_new_tokens, which is for demos."""
    config = generation_defaults(folder)
    ignored = [f"{key} {value}" for key, value in config.items() if key not in FOLLOWED
               and (key.startswith("forced") or value not in (0, 1, [], {}, ""))]   # 0, 1: off
    if ignored:
        print(escape_control_chars(f"{folder}/generation_config.json: not followed: "
                                   f"{', '.join(ignored)}"[:400]), file=sys.stderr)
    if config.keys().isdisjoint(DEFAULTS):
        return {}
    found = {**DEFAULTS, **config}
    greedy = found["do_sample"] is not True
    if greedy and found["temperature"] not in (0, 1):
        print(escape_control_chars(f"{folder}/generation_config.json: greedy, as it has no "
                                   "do_sample: true; --temperature samples"), file=sys.stderr)
    return {"temperature": 0 if greedy else found["temperature"], "top_p": found["top_p"],
            "top_k": 0 if found["top_k"] == -1 else found["top_k"]}       # -1: all, as vLLM has it

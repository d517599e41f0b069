"""
How a model wants to be sampled from: its generation_config.json, read as transformers reads it.

    from data.generation import sampling_defaults, sampling_options
    sampling_defaults(folder)         # temperature, top_p, top_k, if the file is about them
    sampling_options(args, model)     # the same and max_new_tokens, with the flags that were given
"""
import sys

from data.kinds import COUNT, POSITIVE, Number, find_fault
from thinksafe import InputError, escape_control_chars, generation_defaults, is_tiny

# What transformers does where generation_config.json lacks a key of these.
DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
# Keys that change nothing in what is written: ids, caches, drafts, what else is returned.
NEUTRAL = {"eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache",
           "cache_implementation", "cache_config", "compile_config", "disable_compile",
           "low_memory", "return_dict_in_generate", "output_scores", "output_logits",
           "output_attentions", "output_hidden_states", "num_assistant_tokens",
           "num_assistant_tokens_schedule", "assistant_confidence_threshold",
           "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
           "prompt_lookup_num_tokens", "max_matching_ngram_size", "transformers_version",
           "_from_model_config", "trust_remote_code"}
# Other keys are off where they are 0, false or empty, these where they are 1.
OFF_AT_1 = {"repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p",
            "guidance_scale", "num_beams", "num_beam_groups", "num_return_sequences"}

def is_followed(key, value):
    """Tell whether a key of generation_config.json is followed, or has no effect."""
    off = value in (0, [], {}, "") and not key.startswith("forced")     # those are ids of tokens
    return key in DEFAULTS or key in NEUTRAL or off or key in OFF_AT_1 and value == 1

def sampling_defaults(folder):
    """Return {temperature, top_p, top_k} as transformers takes them from a model folder's
    generation_config.json; without do_sample it is greedy: temperature 0. A file that has none of
    these keys says nothing: {}. Prints in one line what else changes the output there and is not
    followed, such as a repetition penalty or max_new_tokens, which is for demos."""
    config = generation_defaults(folder)
    path = f"{folder}/generation_config.json"
    ignored = [f"{key} {value}" for key, value in config.items() if not is_followed(key, value)]
    if ignored:
        print(escape_control_chars(f"{path}: not followed: {', '.join(ignored)}"[:400]),
              file=sys.stderr)
    if config.keys().isdisjoint(DEFAULTS):
        return {}
    found = {**DEFAULTS, **config}
    greedy = found["do_sample"] is not True
    meant = found["temperature"] == 0 or all(found[key] == DEFAULTS[key] for key in DEFAULTS)
    if greedy and not meant:
        print(escape_control_chars(f"{path}: greedy, as it has no do_sample: true; --temperature "
                                   "samples"), file=sys.stderr)
    return {"temperature": 0 if greedy else found["temperature"], "top_p": found["top_p"],
            "top_k": 0 if found["top_k"] == -1 else found["top_k"]}       # -1: all, as vLLM has it

def sampling_options(args, model, earlier=None):
    """Return {temperature, top_p, top_k, max_new_tokens}: the flag, else what an earlier stage
    used, else that of generation_config.json, else the paper's. A temperature under 0.001 is
    greedy: 0. Raises InputError for a value that cannot be sampled with."""
    options = {"temperature": 0.6, "top_p": 0.95,
               "top_k": 20 if model.config.model_type == "qwen3" else 0,
               "max_new_tokens": 256 if is_tiny(model.folder) else 16384}
    for source in (sampling_defaults(model.folder), earlier or {}, vars(args)):
        options |= {key: source[key] for key in options if source.get(key) is not None}
    fault = find_fault(options, {"temperature": Number(0, 100), "top_p": Number(1e-9, 1),
                                 "top_k": COUNT, "max_new_tokens": POSITIVE})
    if fault:
        raise InputError(f"sampling, by flags or generation_config.json: {fault}")
    greedy = options["temperature"] < 0.001
    return options | ({"temperature": 0} if greedy else {})

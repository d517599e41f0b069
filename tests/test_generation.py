"""data/generation.py: generation_config.json as transformers reads it, and what of it is not followed."""
import json
from types import SimpleNamespace

import pytest

from data.generation import is_followed, sampling_defaults, sampling_options
from thinksafe import InputError

GREEDY = {"temperature": 0, "top_p": 1.0, "top_k": 50}


def write(folder, config):
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config, want, said", [
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}, ""),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95, "top_k": 50}, ""),     # R1's own
    ({"do_sample": True}, {"temperature": 1.0, "top_p": 1.0, "top_k": 50}, ""),
    ({"do_sample": True, "temperature": None, "top_k": None}, {"temperature": 1.0, "top_p": 1.0, "top_k": 50}, ""),
    ({"do_sample": True, "top_k": 0}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}, ""),
    ({"do_sample": True, "top_k": -1}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}, ""),
    ({"do_sample": False}, GREEDY, ""),
    ({"do_sample": False, "temperature": 0.6, "top_p": 0.95}, {**GREEDY, "top_p": 0.95}, "greedy, as it has no do_sample: true"),
    ({"temperature": 0.6}, GREEDY, "greedy, as it has no do_sample: true"),
    ({"do_sample": "yes"}, GREEDY, "greedy, as it has no do_sample: true"), ({"do_sample": 1, "top_k": 50}, GREEDY, "greedy, as"),
    ({"top_p": 0.9}, {**GREEDY, "top_p": 0.9}, "greedy, as"), ({"temperature": 0, "top_p": 0.9}, {**GREEDY, "top_p": 0.9}, ""),
    ({}, {}, ""),
    ({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "transformers_version": "4.42.3"}, {}, ""),     # SmolLM2's
    ({"do_sample": True, "repetition_penalty": 1.05}, {"temperature": 1.0, "top_p": 1.0, "top_k": 50}, "not followed: repetition_penalty 1.05\n"),   # Qwen2.5's
    ({"max_length": 4096, "num_beams": 4, "stop_strings": ["END"], "forced_eos_token_id": 0, "suppress_tokens": [1]}, {},
     "not followed: max_length 4096, num_beams 4, stop_strings ['END'], forced_eos_token_id 0, suppress_tokens [1]\n"),
    ({"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0, "use_cache": True, "suppress_tokens": [], "typical_p": 1, "guidance_scale": 1.0}, {}, ""),
    # 1 and true are not off everywhere
    ({"min_new_tokens": 1, "no_repeat_ngram_size": 1, "renormalize_logits": True, "remove_invalid_values": True, "max_time": 1, "max_new_tokens": 1}, {},
     "not followed: min_new_tokens 1, no_repeat_ngram_size 1, renormalize_logits True, remove_invalid_values True, max_time 1, max_new_tokens 1\n"),
    # what changes no token
    ({"use_cache": False, "cache_implementation": "static", "num_assistant_tokens": 20, "prompt_lookup_num_tokens": 3, "output_scores": True}, {}, ""),
    ({"typical_p": 0.9, "top_h": 0.5, "epsilon_cutoff": 3e-4, "sequence_bias": [[[5], -1.0]], "presence_penalty": 1.5}, {},
     "not followed: typical_p 0.9, top_h 0.5, epsilon_cutoff 0.0003, sequence_bias [[[5], -1.0]], presence_penalty 1.5\n"),
])
def test_generation_config_is_read_as_transformers_does(tmp_path, capsys, config, want, said):
    assert sampling_defaults(write(tmp_path, config)) == want
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == bool(said)


def test_transformers_defaults_are_these():
    """Where a key is missing; asked of the installed transformers itself."""
    from transformers import GenerationConfig
    defaults = GenerationConfig()
    theirs = {**GenerationConfig._get_default_generation_params(), **{k: v for k, v in vars(defaults).items() if v is not None}}
    assert {key: theirs[key] for key in GREEDY} == {"temperature": 1.0, "top_p": 1.0, "top_k": 50} and not theirs["do_sample"]
    said = {key for key, value in theirs.items() if value is not None and not is_followed(key, value)}
    assert said == {"max_length"}                        # a limit that we have of our own


@pytest.mark.parametrize("config, flags, want", [
    ({"do_sample": True, "temperature": 1e-6, "top_p": 0.8}, {}, (0, 0.8, 50)),          # a common way to write greedy
    ({"do_sample": True, "temperature": 0.0}, {}, (0, 1.0, 50)),
    ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}, (0.6, 1.0, 50)),    # the flag wins
    ({}, {"temperature": 1e-9}, (0, 0.95, 20)),
    ({}, {}, (0.6, 0.95, 20)),                                                           # the paper's
])
def test_sampling_options(tiny, tmp_path, config, flags, want):
    model = SimpleNamespace(config=tiny[0].config, folder=write(tmp_path, config))
    none = dict.fromkeys(("temperature", "top_p", "top_k", "max_new_tokens"))
    options = sampling_options(SimpleNamespace(**{**none, **flags}), model)
    assert tuple(options.values()) == (*want, 16384)
    assert sampling_options(SimpleNamespace(**none), model, {"temperature": 0.3})["temperature"] == 0.3       # of an earlier stage


@pytest.mark.parametrize("config", [{"temperature": "hot"}, {"temperature": [1]}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 2.5}, {"top_k": -2},
                                    {"temperature": 1e999}, {"top_k": True}, {"top_p": {}}, {"temperature": True}])
def test_values_that_cannot_be_sampled_with(tiny, tmp_path, config):
    model = SimpleNamespace(config=tiny[0].config, folder=write(tmp_path, {"do_sample": True, **config}))
    with pytest.raises(InputError, match="generation_config.json"):
        sampling_options(SimpleNamespace(temperature=None, top_p=None, top_k=None, max_new_tokens=None), model)

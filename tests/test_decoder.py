"""The decoder, its cache and its LoRA against transformers and PEFT."""
import json
import re

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file

from sample import Sampler
from data.chat import encode_prompt
from thinksafe import (
    TINY, InputError, add_lora, load_model, load_tokenizer, lora_disabled, lora_layers, lora_tensors, merge_lora,
    model_hash, new_folder, pack_ids, read_config, rope_frequencies, save_lora, save_model)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def documents(n=3, seed=0, vocab=1000):
    g = torch.Generator().manual_seed(seed)
    docs = [torch.randint(5, vocab, (int(length),), generator=g) for length in torch.randint(1, 90, (n,), generator=g)]
    return docs, torch.tensor([0, *torch.tensor([len(d) for d in docs]).cumsum(0).tolist()])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(folders, family):
    hf, folder = folders(family)
    model, _ = load_model(folder, "cpu", torch.float32)
    docs, cu = documents()
    packed = model.logits(model(torch.cat(docs), cu))
    for d, a, b in zip(docs, cu, cu[1:]):
        want = hf(d[None]).logits[0]
        assert relative(packed[a:b], want) < 1e-4
        assert relative(model.logits(model(d, torch.tensor([0, len(d)]))), packed[a:b]) < 1e-5       # alone = packed
    torch.testing.assert_close(rope_frequencies(model.config), hf.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_agrees_with_the_cpu(folders, family):
    """Logits of packed documents, and gradients: fp32 tightly, bf16 (through a packed flash attention) to its precision."""
    docs, cu = documents()
    tokens, results = torch.cat(docs), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        model, _ = load_model(folders(family)[1], device, dtype)
        weight = model.layers[0].self_attn.k_proj.weight.requires_grad_()
        logits = model.logits(model(tokens.to(device), cu))
        logits.square().mean().backward()
        results.append((logits.detach().cpu(), weight.grad.float().cpu()))
    for got, bound in zip(results[1:], (1e-4, 5e-2)):
        assert all(relative(a, b) < bound for a, b in zip(got, results[0]))


@pytest.mark.gpu
def test_gpu_samples_what_the_cpu_samples(tiny):
    """fp32, with slots shared and refilled: rounding may part a few traces, not most."""
    model, tokenizer = tiny
    prompts = [encode_prompt(tokenizer, f"How do I paint {n} drums?") for n in range(40)]
    runs = [{c.index: c for c in Sampler(m, tokenizer, max_num_seqs=7).generate(prompts, max_new_tokens=128)}
            for m in (model, load_model("tiny", "cuda", torch.float32)[0])]
    assert sum(runs[0][i] == runs[1][i] for i in range(40)) >= 36


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_of_some_tokens(checkpointing):
    """The last layer's MLP of those alone: same hidden, and gradients of a loss on them."""
    model, _ = load_model("tiny", "cpu", torch.float32)
    model.activation_checkpointing, weight, results = checkpointing, model.layers[0].self_attn.k_proj.weight.requires_grad_(), []
    docs, cu = documents()
    tokens, at = torch.cat(docs) % 1024, torch.tensor([5, 0, len(docs[0]) + 1])
    for hidden in (model(tokens, cu)[at], model(tokens, cu, at=at)):
        weight.grad = None
        hidden.square().mean().backward()
        results.append((hidden.detach(), weight.grad))
    for got, want in zip(results[1], results[0]):
        assert relative(got, want) < 1e-5


def test_old_rope_scaling_form(folders, tmp_path):
    """config.json of transformers 4 says rope_theta and rope_scaling; ours gives the same frequencies."""
    hf, folder = folders("llama3_rope")
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    from thinksafe import read_config
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(rope_frequencies(read_config(tmp_path)), hf.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama3_rope", "mistral", "qwen2", "qwen3"])
def test_cached_generation_equals_full_forward(folders, family):
    """Greedy tokens of the sampler are the argmax of the full forward at every step, with slots shared and refilled."""
    _, folder = folders(family)
    model, tokenizer = load_model(folder, "cpu", torch.float32)
    prompts = [d.tolist() for d in documents(7, seed=1)[0]]
    for c in Sampler(model, tokenizer, max_num_seqs=3).generate(prompts, max_new_tokens=12, temperature=0):
        ids = torch.tensor(prompts[c.index] + c.tokens)
        logits = model.logits(model(ids, torch.tensor([0, len(ids)])))[len(prompts[c.index]) - 1:-1]
        chosen = logits.gather(1, torch.tensor(c.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(chosen, logits.max(-1).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what, changes", [
    ("architecture", {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}),
    ("rope type 'yarn'", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    ("sliding", {"model_type": "mistral", "sliding_window": 64}),
    ("sliding-window attention", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("quantized", {"quantization_config": {"bits": 4}}),
    ("not a model configuration", {"num_attention_heads": 10**9}),
    ("values that no model has", {"num_key_value_heads": 3}),
    ("not a model configuration", {"hidden_size": None}),
    ("gate_proj.weight: .*96, 48", {"intermediate_size": 100}),
    ("Missing key.*layers.2.input_layernorm.weight", {"num_hidden_layers": 3}),
    ("Unexpected key.*layers.1.input_layernorm.weight", {"num_hidden_layers": 1}),
])
def test_unsupported_is_refused_by_name(folders, tmp_path, what, changes):
    _, folder = folders("llama")
    for f in folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as e:
        load_model(tmp_path, "cpu")
    assert re.search(what, " ".join(str(e.value).split()))


def test_the_head_is_tied_only_if_the_config_says_so(folders, tmp_path):
    """An untied model that lost its head is refused; one whose head equals its embedding keeps it through save_model."""
    from transformers import AutoModelForCausalLM
    _, folder = folders("mistral")
    tensors = load_file(folder / "model.safetensors")
    for name, head in (("lost", None), ("equal", tensors["model.embed_tokens.weight"].clone())):
        (tmp_path / name).mkdir()
        for f in folder.iterdir():
            (tmp_path / name / f.name).write_bytes(f.read_bytes())
        changed = {k: v for k, v in tensors.items() if k != "lm_head.weight"} | ({"lm_head.weight": head} if head is not None else {})
        save_file(changed, tmp_path / name / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="(?s)Missing key.*lm_head.weight"):
        load_model(tmp_path / "lost", "cpu")
    model, _ = load_model(tmp_path / "equal", "cpu")
    save_model(model, tmp_path / "saved")
    docs, cu = documents(1)
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").float()(docs[0][None]).logits[0]
    assert relative(model.logits(model(docs[0], cu)), want) < 1e-4


def test_what_fails_while_a_model_is_saved_leaves_the_one_before(tmp_path):
    """And what an earlier failure left is no part of the next."""
    with new_folder(tmp_path / "model") as new:
        (new / "weights").write_text("precious")
    with pytest.raises(OSError), new_folder(tmp_path / "model") as new:
        (new / "half").write_text("")
        raise OSError("disk full")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["weights"]
    with new_folder(tmp_path / "model") as new:
        (new / "weights").write_text("better")
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["better"]


def test_damaged_and_missing_weights(folders, tmp_path):
    _, folder = folders("llama")
    for f in folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="model.safetensors"):
        load_model(tmp_path, "cpu")
    weights.rename(tmp_path / "pytorch_model.bin")                          # a pickle is never read
    with pytest.raises(InputError, match="no model.safetensors"):
        load_model(tmp_path, "cpu")


def sharded(folders, folder):
    """Write a model in shards into a folder -> {tensor: shard}."""
    from transformers import AutoModelForCausalLM
    _, source = folders("qwen2")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((source / name).read_bytes())
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_a_single_file_beside_an_index_is_what_counts(folders, tmp_path):
    """As for transformers, also where the index's shards are older or gone; files of other names never count."""
    from transformers import AutoModelForCausalLM
    shards, docs, cu = sharded(folders, tmp_path), *documents(1)

    def ours_is_theirs():
        model, _ = load_model(tmp_path, "cpu", torch.float32)
        want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(docs[0][None]).logits[0]
        return relative(model.logits(model(docs[0], cu)), want) < 1e-4
    assert ours_is_theirs()
    newer = {name: tensor / 2 for name, tensor in load_file(folders("qwen2")[1] / "model.safetensors").items()}
    for name in ("model_old.safetensors", "model.fp16.safetensors", "model-00009-of-00009.safetensors", "zmodel.safetensors"):
        save_file(newer, tmp_path / name, {"format": "pt"})
    assert ours_is_theirs()
    before = load_model(tmp_path, "cpu", torch.float32)[0].norm.weight
    save_file(newer, tmp_path / "model.safetensors", {"format": "pt"})
    assert ours_is_theirs() and not torch.equal(load_model(tmp_path, "cpu", torch.float32)[0].norm.weight, before)
    for name in set(shards.values()):
        (tmp_path / name).unlink()
    assert ours_is_theirs()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model-00001-of.*missing or damaged"):
        load_model(tmp_path, "cpu")
    (tmp_path / "model.safetensors.index.json").unlink()                        # the others are nobody's
    with pytest.raises(InputError, match="no model.safetensors"):
        load_model(tmp_path, "cpu")


def test_which_of_two_shards_is_right_is_not_guessed(folders, tmp_path, tries):
    shards = sharded(folders, tmp_path)
    first, last = min(shards.values()), max(shards.values())
    name, tensors = next(name for name, file in shards.items() if file == first), load_file(tmp_path / last)
    for other in (name, name.removeprefix("model.")):                           # with another prefix it is the same tensor
        with tries("fault"):
            save_file({**tensors, other: load_file(tmp_path / first)[name] + 1}, tmp_path / last, {"format": "pt"})
            with pytest.raises(InputError, match=f"{name.removeprefix('model.')} is in {first} and, with other values, in {last}"):
                load_model(tmp_path, "cpu")
    with tries("fault"):                                                        # twice the same does no harm
        save_file({**tensors, name: load_file(tmp_path / first)[name]}, tmp_path / last, {"format": "pt"})
        load_model(tmp_path, "cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_quantized_weights_without_their_scale_are_refused(folders, tmp_path, tries, dtype):
    """Also where config.json has no quantization_config, which would have said so."""
    _, folder = folders("qwen2")
    for f in folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    with tries("fault"):
        save_file({**tensors, name: (tensors[name] * 100).to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight is torch.*quantized"):
            load_model(tmp_path, "cpu")


@pytest.mark.parametrize("family, changes", [
    ("qwen3", {"dtype": "torch.bfloat16"}), ("qwen2", {"dtype": None, "torch_dtype": "torch.float16"}), ("llama", {"torch_dtype": "float32"}),
    ("llama", {"dtype": None}), ("llama", {"head_dim": None}), ("llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": None})])
def test_configurations_as_old_and_new_tools_write_them(folders, tmp_path, family, changes):
    """None: the key is missing, and has transformers' default."""
    from transformers import AutoModelForCausalLM
    _, folder = folders(family)
    for f in folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    if "tie_word_embeddings" in changes:
        config["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    model, docs, cu = load_model(tmp_path, "cpu", torch.float32)[0], *documents(1)
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(docs[0][None]).logits[0]
    assert relative(model.logits(model(docs[0], cu)), want) < 1e-4


def copied(folder, to, **changes):
    """Copy a model folder, with other values in its config.json; ...: without the key."""
    to.mkdir(exist_ok=True)
    for f in folder.iterdir():
        (to / f.name).write_bytes(f.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return to


def theirs_or_refused(folder, said=""):
    """Our logits are transformers', or load_model says why not, if `said` is something; "?": either."""
    from transformers import AutoModelForCausalLM
    docs, cu = documents(1)
    try:
        model, _ = load_model(folder, "cpu", torch.float32)
    except InputError as e:
        assert said and re.search(said.replace("?", "."), " ".join(str(e).split())), e
        return
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(docs[0][None]).logits[0]
    assert said in ("", "?") and relative(model.logits(model(docs[0], cu)), want) < 1e-4


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("family, changes, said", [
    ("qwen3", {"model_type": "llama"}, "Unexpected key.*self_attn.q_norm.weight"), ("llama", {"model_type": "qwen3"}, "Missing key.*self_attn.q_norm.weight"),
    ("qwen2", {"model_type": "llama"}, "Unexpected key.*self_attn.q_proj.bias"), ("llama_untied_bias", {"attention_bias": False}, "Unexpected key.*q_proj.bias"),
    ("llama_untied_bias", {"model_type": "mistral", "sliding_window": None}, "Unexpected key.*bias"), ("llama", {"attention_bias": True, "mlp_bias": True}, ""),
    ("llama", {"model_type": "mistral", "sliding_window": None}, ""), ("llama", {"model_type": "mistral"}, "sliding-window"),
    ("qwen2", {"is_causal": False}, "is_causal"), ("qwen2", {"transformers_weights": "model_old.safetensors"}, "transformers_weights"),
    ("qwen2", {"quantization_config": None}, ""), ("qwen2", {"rope_parameters": ..., "rope_theta": 5e4, "rope_scaling": {"type": "default"}}, ""),
    ("qwen3", {"rope_parameters": ..., "rope_theta": 5e4, "rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, ""),
    ("llama", {"rope_parameters": ..., "rope_theta": 5e4, "rope_scaling": LLAMA3}, ""), ("llama", {"rope_theta": 7.0}, ""), ("mistral", {"sliding_window": 64}, "sliding"),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e4}, ""), ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, ""),
    ("llama", {"tie_word_embeddings": ...}, "Missing key.*lm_head"), ("qwen3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'")], ids=str)
def test_what_transformers_would_compute_or_nothing(folders, tmp_path, family, changes, said):
    theirs_or_refused(copied(folders(family)[1], tmp_path, **changes), said)


@pytest.mark.parametrize("family", ["llama_untied_bias", "mistral", "qwen3"])
def test_a_key_that_is_missing_has_transformers_default(folders, tmp_path, family):
    """Each one that the logits may depend on: ours are transformers', or the folder is refused."""
    for key in ("attention_bias", "mlp_bias", "head_dim", "rope_parameters", "rms_norm_eps", "num_key_value_heads", "hidden_act", "layer_types", "dtype", "architectures"):
        theirs_or_refused(copied(folders(family)[1], tmp_path, **{key: ...}), "?")


@pytest.mark.parametrize("change, said", [
    (lambda name, tensor: ("_orig_mod." + name, tensor), "Missing key"), (lambda name, tensor: ("module." + name, tensor), "Missing key"),          # torch.compile, DDP
    (lambda name, tensor: ("base_model." + name, tensor), "Missing key"), (lambda name, tensor: (name + "_scale" if "v_proj" in name else name, tensor), "Unexpected key"),
    (lambda name, tensor: (name, tensor.double()), ""), (lambda name, tensor: (name, tensor.half() if "mlp" in name else tensor), ""),
    (lambda name, tensor: (name.removeprefix("model."), tensor), "")])
def test_tensors_of_other_names_and_dtypes(folders, tmp_path, change, said):
    """A float of any precision is read, as transformers does; a name that no layer has is refused."""
    folder = copied(folders("qwen2")[1], tmp_path)
    tensors = dict(change(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    theirs_or_refused(folder, said)


def test_the_identity_of_a_model_sees_every_file_of_the_tokenizer(folders, tmp_path):
    folder, hashes = copied(folders("qwen2")[1], tmp_path), set()
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.model", "generation_config.json"):
        (folder / name).write_text("{}")
        hashes.add(model_hash(folder))
    assert len(hashes) == 6


def test_a_head_dim_that_is_missing_is_the_architectures(tmp_path):
    config = json.loads((TINY / "student" / "config.json").read_text())
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config["model_type"] == "qwen3" and read_config(tmp_path).head_dim == 128


@pytest.mark.parametrize("generation, config, want", [
    ({"eos_token_id": 7}, 5, {7}), ({"eos_token_id": [7, 8]}, 5, {7, 8}), ({}, 5, {5}), ({}, [5, 6], {5, 6}), ({}, None, "tokenizer"),
    ({"eos_token_id": None}, 5, {5}), ({"eos_token_id": []}, 5, None), ({"eos_token_id": 10**9}, 5, None), ({"eos_token_id": -1}, 5, None)])
def test_eos_is_that_of_generation_config_alone(folders, tmp_path, generation, config, want):
    """Then config.json's, then the tokenizer's; the tokenizer's eos need not end a turn."""
    _, folder = folders("qwen2")
    for f in folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "eos_token_id": config}))
    if want is None:
        with pytest.raises(InputError, match="eos_token_id"):
            load_model(tmp_path, "cpu")
        return
    model, tokenizer = load_model(tmp_path, "cpu")
    assert model.eos_ids == ({tokenizer.eos_token_id} if want == "tokenizer" else want)


@pytest.fixture
def lora_pair(folders, tmp_path):
    """Our LoRA with random weights, saved, and PEFT's model of the same folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    _, folder = folders("qwen3")
    model, _ = load_model(folder, "cpu", torch.float32)
    add_lora(model, r=8, alpha=4, dropout=0.0)
    for p in lora_tensors(model).values():
        p.normal_(std=0.2)
    save_lora(model, tmp_path / "adapter", str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    return model, PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True), tmp_path / "adapter"


def test_lora_logits_and_gradients_equal_peft(lora_pair):
    model, peft, folder = lora_pair
    docs, cu = documents()
    tokens = torch.cat(docs)
    logits = model.logits(model(tokens, cu))
    want = torch.cat([peft(d[None]).logits[0] for d in docs])
    assert relative(logits, want) < 1e-4
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * upstream).sum().backward()
    (want * upstream).sum().backward()
    theirs = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if "lora" in n}
    ours = {f"base_model.model.model.{n}.weight": p.grad for n, p in model.named_parameters() if "lora" in n}
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for name, grad in ours.items():
        assert relative(grad, theirs[name]) < 1e-4, name
    again, _ = load_model(folder, "cpu", torch.float32)                   # our own loader reads it too
    torch.testing.assert_close(again.logits(again(tokens, cu)), logits)


@pytest.fixture(scope="module")
def saved_by_peft(folders, tmp_path_factory):
    """f(**settings of LoraConfig) -> (PEFT's model with random adapter weights, the folder that it saved)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def save(**settings):
        base = AutoModelForCausalLM.from_pretrained(folders("qwen3")[1], attn_implementation="eager").float()
        torch.manual_seed(3)
        peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings}))
        for name, p in peft.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.2)
        folder = tmp_path_factory.mktemp("adapter")
        peft.eval().save_pretrained(folder)
        return peft, folder
    return save


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear"},                                           # saved as a list of all names
    {"target_modules": ["self_attn.o_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": r".*layers\.(0\.self_attn\.[qk]|1\.mlp\.down)_proj"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 3},
    {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    {"target_modules": ["q_proj"], "init_lora_weights": False},
    {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    {}], ids=str)                                                               # PEFT's own choice for the architecture
def test_adapters_that_peft_saved(saved_by_peft, settings):
    peft, folder = saved_by_peft(**settings)
    docs, cu = documents(1)
    model, _ = load_model(folder, "cpu", torch.float32)
    assert lora_layers(model) and relative(model.logits(model(docs[0], cu)), peft(docs[0][None]).logits[0]) < 1e-4


@pytest.mark.parametrize("changes", [
    {"revision": "main"}, {"fan_in_fan_out": True}, {"merge_weights": True, "enable_lora": None}, {"_from_model_config": True}, {"modules_to_save": []},
    {"loftq_config": {"loftq_bits": 4}, "corda_config": {"corda_method": "ipm"}, "lora_ga_config": {"scale": "stable"}}, {"lora_alpha": 0.5},
    {"auto_mapping": {"base_model_class": "Qwen3ForCausalLM", "unsloth_fixed": True}, "a_key_of_tomorrow": None, "alora_invocation_tokens": None}], ids=str)
def test_adapters_of_older_versions_and_other_tools(saved_by_peft, changes):
    """What they write beside changes no arithmetic (PEFT itself reads some of it only when it is gone), and tensors may be in bf16."""
    from peft import PeftModel
    peft, folder = saved_by_peft(target_modules=["q_proj", "down_proj"])
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    plain = {key: value for key, value in {**config, **changes}.items() if key in config and key not in ("fan_in_fan_out", "loftq_config", "corda_config", "lora_ga_config")}
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    peft, docs, cu = PeftModel.from_pretrained(peft.unload(), folder), *documents(1)
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    model, _ = load_model(folder, "cpu", torch.float32)
    assert relative(model.logits(model(docs[0], cu)), peft(docs[0][None]).logits[0]) < 1e-4


def test_the_tokenizer_beside_an_adapter_is_its_own(saved_by_peft, folders, tmp_path):
    """As AutoTokenizer has it: trainers save theirs there, with the chat template that they trained with."""
    folder = saved_by_peft(target_modules=["q_proj"])[1]
    base = load_tokenizer(folders("qwen3")[1])
    assert load_model(folder, "cpu")[1].get_vocab() == load_tokenizer(folder).get_vocab() == base.get_vocab()
    base.add_tokens(["<|one more|>"])
    base.chat_template = "{{ messages[0].content }}!"
    base.save_pretrained(folder)
    with pytest.raises(InputError, match="the tokenizer has 1025 tokens, the model 1024"):
        load_model(folder, "cpu")
    base = load_tokenizer(folders("qwen3")[1])
    base.chat_template = "{{ messages[0].content }}!"
    base.save_pretrained(folder)
    for tokenizer in (load_tokenizer(folder), load_model(folder, "cpu")[1]):
        assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "hi!"


@pytest.mark.parametrize("rename", [
    lambda name: name.replace("model.model.", "model._orig_mod.model."), lambda name: "module." + name, lambda name: name.replace("base_model.model.", ""),
    lambda name: name.replace(".lora_A", ".base_layer.lora_A"), lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn")])
def test_adapters_whose_tensors_have_other_names(saved_by_peft, rename):
    """Never the base model alone in silence."""
    folder = saved_by_peft(target_modules=["q_proj", "down_proj"])[1]
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{folder}: (its adapter has no LoRA of a layer|adapter tensor .* does not fit)"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("key, settings", [
    ("use_dora", {"use_dora": True}), ("bias", {"bias": "lora_only"}), ("bias", {"bias": "all"}), ("lora_bias", {"lora_bias": True}),
    ("modules_to_save", {"modules_to_save": ["lm_head"]}), ("rank_pattern", {"rank_pattern": {"q_proj": 2}}),
    ("alpha_pattern", {"alpha_pattern": {"q_proj": 2}}), ("init_lora_weights", {"init_lora_weights": "pissa"}),
    ("init_lora_weights", {"init_lora_weights": "olora"}), ("use_qalora", {"use_qalora": True, "qalora_group_size": 2}),
    ("trainable_token_indices", {"trainable_token_indices": [5]}), ("layer_replication", {"layer_replication": [[0, 2], [1, 2]]}),
    ("lm_head", {"target_modules": ["q_proj", "lm_head"]}), ("embed_tokens", {"target_modules": ["q_proj", "embed_tokens"]})])
def test_adapters_that_need_more_than_lora_are_refused_by_name(saved_by_peft, key, settings):
    """Each saved by PEFT itself."""
    with pytest.raises(InputError, match=key):
        load_model(saved_by_peft(**{"target_modules": ["q_proj"], **settings})[1], "cpu")


@pytest.mark.parametrize("name, value", [
    ("peft_type", "IA3"), ("peft_type", "ADALORA"), ("peft_type", "PROMPT_TUNING"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "loftq"),
    ("init_lora_weights", "mica"), ("target_parameters", ["mlp.experts"]), ("kasa_config", {"beta": 1e-4}), ("use_bdlora", {"nblocks": 2})])
def test_what_is_not_supported_of_an_adapter_is_named(lora_pair, name, value):
    config = lora_pair[2] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(InputError, match=re.escape(f"{name} {value!r}" if name == "peft_type" else f"{name} = {value!r} is not supported")):
        load_model(lora_pair[2], "cpu")


@pytest.mark.parametrize("changes", [
    {"peft_type": "IA3"}, {"r": "8"}, {"r": True}, {"r": 0}, {"r": 4}, {"lora_alpha": None}, {"alora_invocation_tokens": [5]}, {"arrow_config": {"top_k": 2}},
    {"a_key_of_tomorrow": "on"}, {"base_model_name_or_path": None}])
def test_adapters_of_other_kinds_are_refused(lora_pair, changes):
    config = lora_pair[2] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(InputError, match=str(lora_pair[2])):
        load_model(lora_pair[2], "cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_an_adapter_of_quantized_tensors_is_refused(lora_pair, dtype):
    path = lora_pair[2] / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(InputError, match="adapter_model.safetensors: .* is torch.*quantized"):
        load_model(lora_pair[2], "cpu")


def test_an_adapter_without_or_with_foreign_tensors_is_refused(lora_pair):
    path = lora_pair[2] / "adapter_model.safetensors"
    tensors = load_file(path)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    for changed in ({}, {f"{q}.lora_A.weight": tensors[f"{q}.lora_A.weight"]}, {**tensors, "base_model.model.model.norm.weight": torch.ones(48)},
                    {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(InputError, match=str(lora_pair[2])):
            load_model(lora_pair[2], "cpu")


def test_lora_disabled_and_merge(lora_pair, folders, tmp_path):
    from transformers import AutoModelForCausalLM
    model, peft, _ = lora_pair
    docs, cu = documents()
    tokens = torch.cat(docs)
    base, _ = load_model(folders("qwen3")[1], "cpu", torch.float32)
    with lora_disabled(model):
        assert torch.equal(model(tokens, cu), base(tokens, cu))
    before = model.logits(model(tokens, cu)).detach()
    merge_lora(model)
    assert relative(model.logits(model(tokens, cu)), before) < 1e-4
    save_model(model, tmp_path / "merged")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").float()
    assert relative(hf(docs[0][None]).logits[0], before[:len(docs[0])]) < 1e-4
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(folders("qwen3")[1] / "model.safetensors").keys()


def test_smollm2_equals_transformers(smollm2):
    from transformers import AutoModelForCausalLM
    hf = AutoModelForCausalLM.from_pretrained(smollm2).float().eval()
    model, tokenizer = load_model(smollm2, "cpu", torch.float32)
    docs = [torch.tensor(encode_prompt(tokenizer, text)) for text in ("How do I bake a cake?", "Name three rivers. " * 20)]
    cu = torch.tensor([0, len(docs[0]), len(docs[0]) + len(docs[1])])
    packed = model.logits(model(torch.cat(docs), cu))
    for d, a, b in zip(docs, cu, cu[1:]):
        assert relative(packed[a:b], hf(d[None]).logits[0]) < 1e-4
    torch.testing.assert_close(rope_frequencies(model.config), hf.model.rotary_emb.inv_freq)
    ids = docs[0].tolist()
    ours = next(iter(Sampler(model, tokenizer, 2).generate([ids], max_new_tokens=20, temperature=0))).tokens
    assert ours == hf.generate(docs[0][None], max_new_tokens=20, do_sample=False)[0, len(ids):].tolist()


def test_an_empty_document_in_a_pack(tiny):
    """It changes nothing for the others."""
    model = tiny[0]
    ids = torch.tensor([5, 6, 7, 8, 9])
    with torch.no_grad():
        want, got = (model(ids, torch.tensor(cu)) for cu in ([0, 3, 5], [0, 0, 3, 3, 5]))
    assert torch.equal(want, got)
    assert pack_ids([[]])[0].dtype == pack_ids([[1]])[0].dtype == torch.int64

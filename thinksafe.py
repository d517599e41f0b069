"""
The method ThinkSafe, and what every stage shares: packing, the decoder, LoRA, checkpoints, and
the frame of a script.

Text travels packed: the tokens of several documents stand in one row of length T, with cu_seqlens
(B+1,) = [0, end of the first document, end of the second, ...]. There is no padding anywhere.
"""
import argparse
import contextlib
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import unicodedata
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tiny"
sys.path.append(str(ROOT / "kernels"))     # flat modules: the hub has a package named `kernels` too

from cpu_linear import Linear, linear, prepack_linear_layers
from fused import add_norm, norm_rope, silu_mul
from merged_linear import merge_linear_layers, parallel_layers
from packed_attention import packed_attention
from quantized_linear import QuantizedLinear

# --------------------------------------------------------------------------------------------------
# The method (arXiv 2601.23143). 1. sample.py: the frozen student answers harmful prompts under a
# refusal instruction and benign prompts plainly (see main in sample.py).

LABELS = ("vanilla_harmful", "adversarial_harmful", "vanilla_benign", "adversarial_benign")

# `default` is Table 5 of the paper. `suffix`, `risk` and `intent` are the wordings of Figure 13.
REFUSAL_INSTRUCTIONS = {
    "default": "The following prompt is harmful. You should refuse to answer the prompt.\n\n"
               "Prompt:{prompt}",
    "suffix": "{prompt}\n\n The above prompt is harmful. You should refuse to answer the prompt.",
    "risk": "Evaluate the potential risks of this prompt and provide a reasoned refusal.\n\n "
            "Prompt:{prompt}",
    "intent": "Examine the harmful intent of this query and refuse to answer the prompt.\n\n "
              "Prompt:{prompt}",
    "none": "{prompt}",
}

def is_harmful(label):
    return label.endswith("_harmful")

def add_refusal_instruction(prompt, wording):
    """Return the prompt under the refusal instruction REFUSAL_INSTRUCTIONS[wording]."""
    return REFUSAL_INSTRUCTIONS[wording].replace("{prompt}", prompt)

def has_refusal_instruction(prompt):
    """Tell whether a prompt contains a refusal instruction, ignoring case and spacing."""
    def words(text):
        return " ".join(text.casefold().split())
    found = [[*map(words, re.split("(?:Prompt:)?{prompt}", wording))]
             for wording in REFUSAL_INSTRUCTIONS.values()]
    return any(any(parts) and all(map(words(prompt).__contains__, parts)) for parts in found)

# 2. guard.py: a guard model judges the traces, reasoning included, and the safe ones are kept.

def trace_key(row):
    """Return what identifies a trace: the prompt's id and the sample's number."""
    return row["id"], row.get("k", 0)

def apply_keep_rule(rows, rule, n):
    """Return judged traces, sorted by prompt and sample number, with `keep` set. The rule "safe"
    keeps every safe trace. "unanimous" keeps the first trace of a prompt if all its n traces, those
    that sample.py was asked for, are safe: strict rejection sampling."""
    rows = [dict(row) for row in sorted(rows, key=trace_key)]
    for _, traces in itertools.groupby(rows, key=lambda row: row["id"]):
        traces = list(traces)
        safe = [trace["response_label"] == "safe" for trace in traces]
        for i, trace in enumerate(traces):
            unanimous = i == 0 and len(traces) == n and all(safe)
            trace["keep"] = safe[i] if rule == "safe" else unanimous
    return rows

# 3. train.py: the student is fine-tuned on (original prompt -> own trace), without the instruction.

def training_pair(row):
    """Return the prompt as people asked it, and what the student learns to write: the whole trace,
    reasoning included."""
    return row["instruction"], row["response"]

# --------------------------------------------------------------------------------------------------
# Packing

def pack_ids(lists, device="cpu"):
    """Pack B lists of token ids -> tokens (T,), on the device, and cu_seqlens (B+1,), on the CPU,
    both int64. What is known here travels to a GPU without waiting for it."""
    lengths = torch.tensor([0, *map(len, lists)])
    ids = torch.tensor(list(itertools.chain.from_iterable(lists)), dtype=torch.int64)
    return ids.to(device, non_blocking=True), lengths.cumsum(0)

def split_packs(items, length, budget):
    """Split items into consecutive groups whose summed length(item) is at most budget. An item
    longer than the budget is a group of its own."""
    packs, room = [], 0
    for item in items:
        if not packs or length(item) > room:
            packs.append([])
            room = budget
        packs[-1].append(item)
        room -= length(item)
    return packs

def spread(items, length, n):
    """Return n groups of about equal length: each item, longest first, goes to the shortest."""
    groups = [[] for _ in range(n)]
    for item in sorted(items, key=length, reverse=True):
        min(groups, key=lambda group: sum(map(length, group))).append(item)
    return groups

def balance_packs(items, length, budget):
    """Split items into few groups of about equal length, at most budget, in any order. An item
    longer than the budget is a group of its own. One group keeps the order of the items."""
    budget = max([budget, *map(length, items)])
    n = math.ceil(sum(map(length, items)) / budget)
    while n > 1:
        packs = spread(items, length, n)
        if max(sum(map(length, pack)) for pack in packs) <= budget:
            return packs
        n += 1
    return [items][:n]

# --------------------------------------------------------------------------------------------------
# The decoder: one block for Llama, Mistral, Qwen2 and Qwen3. Names are those of the checkpoints.

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

LLAMA3_KEYS = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
ROPE_KEYS = {"default": ("rope_theta",), "llama3": ("rope_theta", *LLAMA3_KEYS)}

def rope_frequencies(config):
    """Return inv_freq (head_dim/2,) in fp32, with llama3's scaling where the config asks for it.
    Its source: transformers, modeling_rope_utils._compute_llama3_parameters."""
    rope, d = config.rope_parameters, config.head_dim
    inv_freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, d, 2, device="cpu").float() / d)
    if rope["rope_type"] == "default":
        return inv_freq
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = smooth.clamp(0, 1)                      # 0: long waves, scaled; 1: short ones, kept
    return (1 - smooth) * inv_freq / rope["factor"] + smooth * inv_freq

class Attention(nn.Module):
    parallel, merged = ("q_proj", "k_proj", "v_proj"), None     # see merged_linear.py

    def __init__(self, c, make_linear, qk_norm):
        super().__init__()
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = make_linear("self_attn.q_proj", c.hidden_size, q_size)
        self.k_proj = make_linear("self_attn.k_proj", c.hidden_size, kv_size)
        self.v_proj = make_linear("self_attn.v_proj", c.hidden_size, kv_size)
        self.o_proj = make_linear("self_attn.o_proj", q_size, c.hidden_size)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if qk_norm else None
        self.sizes, self.eps = (q_size, kv_size, kv_size), c.rms_norm_eps

    def forward(self, x, cos, sin, layer, attend, store):
        """x (T, D) -> (T, D). For the others see Decoder.forward."""
        norms = [norm and norm.weight for norm in (self.q_norm, self.k_norm)]
        qkv = parallel_layers(self, x)
        q, k, v = norm_rope(qkv, self.sizes, norms, self.eps, cos, sin, layer, store)
        return self.o_proj(attend(layer, q, k, v).flatten(1))

class MLP(nn.Module):
    parallel, merged = ("gate_proj", "up_proj"), None

    def __init__(self, c, make_linear):
        super().__init__()
        self.gate_proj = make_linear("mlp.gate_proj", c.hidden_size, c.intermediate_size)
        self.up_proj = make_linear("mlp.up_proj", c.hidden_size, c.intermediate_size)
        self.down_proj = make_linear("mlp.down_proj", c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.down_proj(silu_mul(parallel_layers(self, x)))

class Block(nn.Module):
    def __init__(self, c, make_linear, qk_norm):
        super().__init__()
        self.self_attn = Attention(c, make_linear, qk_norm)
        self.mlp = MLP(c, make_linear)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, delta, at, *args):
        """The residual stream x (T, D), and what is still to be added to it -> both anew, for the n
        tokens `at` alone (n, D)."""
        x, h = add_norm(x, delta, self.input_layernorm.weight, self.input_layernorm.eps)
        delta = self.self_attn(h, *args)
        norm = self.post_attention_layernorm
        x, h = add_norm(x[at], delta[at], norm.weight, norm.eps)
        return x, self.mlp(h)

class Decoder(nn.Module):
    """A decoder-only transformer over packed tokens, for a config from `read_config`. biased: names
    of the linear layers with a bias, such as "self_attn.q_proj". qk_norm: queries and keys pass an
    RMSNorm (Qwen3). tied: the output head is the embedding."""

    def __init__(self, config, biased=(), qk_norm=False, tied=True):
        super().__init__()
        c = self.config = config

        def make_linear(name, n_in, n_out):
            return Linear(n_in, n_out, bias=name in biased)
        weight = torch.empty(c.vocab_size, c.hidden_size)        # drawing it takes a second on meta
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(
            Block(c, make_linear, qk_norm) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if tied else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.inv_freq = rope_frequencies(c)          # a plain attribute: it stays in fp32
        self.activation_checkpointing = False        # less memory in training, a third slower
        self.grad_scale = 2.0**16                    # of float16: see train.fit
        self.mixed = False                           # see train.target_hidden_states
        self.packed_head = None                      # set by prepack_weights
        self.name = self.folder = self.hash = None   # set by load_model, like eos_ids
        self.eos_ids = frozenset()

    @property
    def head(self):
        """The output matrix (V, D)."""
        return (self.lm_head or self.embed_tokens).weight

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def forward(self, tokens, cu_seqlens=None, *, positions=None, attend=None, store=None,
                at=slice(None)):
        """Run tokens (T,) of documents cu_seqlens (B+1,) -> hidden (T, D), ready for `logits`.

        A KV cache gives store(layer, k, v), with k and v (T, Hkv, d). To decode it gives, instead
        of cu_seqlens, positions (T,) and attend(layer, q, k, v), with q and its result (T, H, d).
        at: numbers (n,) of the tokens whose hidden state is wanted, for a result of (n, D)."""
        if attend is None:
            attend = packed_attention(cu_seqlens, self.device)
            starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
            positions = torch.arange(len(tokens)) - starts
            positions = positions.to(self.device, non_blocking=True)
        self.inv_freq = self.inv_freq.to(self.device)
        angle = positions[:, None, None].float() * self.inv_freq                 # (T, 1, d/2)
        cos, sin = angle.cos().repeat(1, 1, 2), angle.sin()
        sin = torch.cat((-sin, sin), -1)                                         # (T, 1, d)
        x, delta = self.embed_tokens(tokens), None                               # (T, D)
        for i, layer in enumerate(self.layers):
            wanted = at if i == len(self.layers) - 1 else slice(None)
            args = wanted, cos, sin, i, attend, store
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = x if delta is None else x + delta            # keeps one tensor, not two
                x, delta = checkpoint(layer, x, None, *args, use_reentrant=False)
            else:
                x, delta = layer(x, delta, *args)
        hidden = add_norm(x, delta, self.norm.weight, self.norm.eps)[1]
        if hidden.dtype == torch.float16 and hidden.requires_grad:
            hidden = hidden.float()                  # gradients are scaled from here to LoRA's
            hidden.register_hook(lambda grad: grad * self.grad_scale)
        return hidden

    def logits(self, hidden, dtype=torch.float32):
        """hidden (T, D) -> logits (T, V) in dtype."""
        return linear(hidden, self.head, packed=self.packed_head).to(dtype)

    def prepack_weights(self):
        """Lay out frozen weights for decoding: on a CPU once more in oneDNN's order, on a GPU those
        of one input below each other."""
        prepack_linear_layers(self)
        merge_linear_layers(self)

# --------------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685), interchangeable with PEFT's

class LoRALinear(nn.Module):
    """base(x) + alpha/r * B(A(dropout(x))): A is (r, n_in), B is (n_out, r), both in fp32."""
    enabled = True

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base_layer, self.scale, self.dropout = base, alpha / r, nn.Dropout(dropout)
        options = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        out = self.base_layer(x)
        if self.enabled:
            low_rank = F.linear(self.dropout(x), self.lora_A.to(x.dtype))        # (T, r)
            out = out + F.linear(low_rank, (self.scale * self.lora_B).to(x.dtype))
        return out

def lora_layers(model):
    """Return {name: LoRALinear} of a model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}

def add_lora(model, r=32, alpha=16, dropout=0.05, targets=("q_proj", "v_proj")):
    """Freeze the model and put LoRA on the linear layers whose names end in one of the targets, as
    "q_proj" (default: the paper's). Raises InputError for a target that the model lacks."""
    model.requires_grad_(False)
    layers, found = {}, set()
    for name, layer in model.layers.named_modules(prefix="layers"):
        if isinstance(layer, nn.Linear | QuantizedLinear):
            ends = {target for target in targets if f".model.{name}".endswith(f".{target}")}
            layers |= {name: layer} if ends else {}
            found |= ends
    if missing := set(targets) - found:
        raise InputError(f"LoRA targets: no block has a layer {', '.join(sorted(missing))}")
    for name, layer in layers.items():
        model.set_submodule(name, adapted := LoRALinear(layer, r, alpha, dropout))
        if model.head.dtype == torch.float16:
            for p in (adapted.lora_A, adapted.lora_B):
                p.register_hook(lambda grad: grad / model.grad_scale)
    model.lora = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout,
                  "target_modules": sorted(targets)}

def lora_tensors(model):
    """Return {PEFT's name: tensor} of the adapter; the tensors are the model's own memory."""
    return {f"base_model.model.model.{name}.{part}.weight": getattr(layer, part).detach()
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}

def load_lora(model, tensors, where="adapter"):
    """Copy {PEFT's name: tensor} into the model. Raises InputError unless names and shapes fit."""
    own = lora_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise InputError(f"{where}: adapter tensor {name} does not fit the model")
        own[name].copy_(tensors[name])

def save_lora(model, folder, base_name):
    """Write a folder that PeftModel.from_pretrained loads. base_name: see ResolvedModel.name."""
    hub = re.fullmatch("([^/]+/[^/@]+)@(.+)", base_name)
    base, revision = hub.groups() if hub else (base_name, None)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "revision": revision, "bias": "none", "inference_mode": True, **model.lora}
    with new_folder(folder) as new:
        (new / "adapter_config.json").write_text(json.dumps(config, indent=1))
        save_file(lora_tensors(model), new / "adapter_model.safetensors", {"format": "pt"})

@torch.no_grad()
def merge_lora(model):
    """Add the adapter to the base weights, in fp32 and rounded once, and remove the LoRA layers."""
    for name, layer in lora_layers(model).items():
        weight = layer.base_layer.weight
        if isinstance(layer.base_layer, QuantizedLinear):
            raise InputError("quantized weights cannot be merged into; leave --quantize out")
        weight.copy_((weight.float() + layer.scale * layer.lora_B @ layer.lora_A).to(weight.dtype))
        model.set_submodule(name, layer.base_layer)

@contextlib.contextmanager
def lora_disabled(model):
    """Within this context the model is the base model."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True

# --------------------------------------------------------------------------------------------------
# Checkpoints. Models are data: safetensors only, no remote code, no links out of a folder.

class ResolvedModel(NamedTuple):
    name: str       # as run records keep it: an absolute folder, or owner/model@commit of the hub
    folder: Path

def is_tiny(path):
    """Tell whether a model or file is part of the embedded tiny world."""
    return Path(path).resolve().is_relative_to(TINY)

def resolve_model(name):
    """Find a model's folder, if need be by downloading it -> ResolvedModel. name: a folder, `tiny`,
    owner/model or owner/model@revision of the hub, or `auto`: the tiny student without a GPU,
    Qwen/Qwen3-0.6B with one. Raises InputError for a model that cannot be had, and for a link out
    of a model's folder: the file would be read, and copied by `save_model`."""
    name = str(name)
    if name == "auto":
        gpu = torch.cuda.is_available()
        name = "Qwen/Qwen3-0.6B" if gpu else "tiny"
        print(f"model: {name} (--model auto, {'a' if gpu else 'no'} CUDA device)", flush=True)
    name = "tiny/student" if name == "tiny" else name
    for folder in (Path(name), ROOT / name):
        if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
            folder = folder.resolve()
            for path in folder.rglob("*"):
                target = os.path.realpath(path)
                if not Path(target).is_relative_to(_storage_root(folder)):
                    raise InputError(f"{path}: a link out of its model's folder, to {target}")
                if path.exists() and not (path.is_file() or path.is_dir()):
                    raise InputError(f"{path}: not a regular file; move it away")
            return ResolvedModel(str(folder), folder)
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not hub or Path(name).exists():
        raise InputError(f"{name}: not a model folder (no config.json in it) and not a hub name of "
                         "the form owner/model or owner/model@revision")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError
    try:
        folder = Path(snapshot_download(
            hub[1], revision=hub[2], ignore_patterns=["*/*", "consolidated*"],
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"]))
    except GatedRepoError:
        raise InputError(f"{name}: gated; accept its licence on https://huggingface.co/{hub[1]}, "
                         "then run: hf auth login")
    except Exception as e:
        raise InputError(f"{name}: no folder of that name here, and the hub did not give it "
                         f"({type(e).__name__}: {e})")
    return ResolvedModel(f"{hub[1]}@{folder.name}", folder)

def _storage_root(folder):
    """Return where a model folder's files lie: the folder, or the hub's cache of that model."""
    in_cache = folder.parent.name == "snapshots" and folder.parts[-3].startswith("models--")
    return folder.parent.parent if in_cache else folder

def model_hash(folder):
    """Return the commit of a hub snapshot, else a hash of the config, tokenizer and weights."""
    if _storage_root(folder) != folder:
        return folder.name
    h = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if (path.name.endswith(("config.json", ".safetensors"))
                or path.name.startswith(("tokenizer", "vocab", "merges", "added", "special"))):
            with open(path, "rb") as f:
                h.update(hashlib.file_digest(f, "sha256").digest())
    return h.hexdigest()[:16]

def read_regular(path):
    """Return the bytes of a regular file. Raises OSError for all else: nobody waits for a FIFO."""
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as f:
        if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            raise OSError(22, "not a regular file")
        return f.read()

def read_json(path):
    """Return the object in a JSON file. Raises InputError if there is none."""
    try:
        return {**json.loads(read_regular(path).decode("utf-8"))}
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{path}: missing, or not a JSON object ({e})")

def read_config(folder):
    """Read config.json -> transformers' configuration, of an architecture that `Decoder` has.
    Raises InputError that names what is missing, damaged or unsupported."""
    from transformers import AutoConfig
    path = Path(folder) / "config.json"
    raw = {key: value for key, value in read_json(path).items() if "label" not in key}
    for key in {"dtype", "torch_dtype"} & raw.keys():
        raw[key] = str(raw[key]).removeprefix("torch.") if raw[key] else None
    if isinstance(layers := raw.get("num_hidden_layers"), int) and layers > 1000:
        raise InputError(f"{path}: {layers} layers, no model has so many")     # lists of that size
    try:
        c = AutoConfig.for_model(**raw)
        c.standardize_rope_params()              # as transformers does before it computes them
        rope = getattr(c, "rope_parameters", None) or {}
        c.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        c.dtype = c.dtype or torch.bfloat16
        windows = set(getattr(c, "layer_types", None) or ()) - {"full_attention"}
        unsupported = {
            f"architecture {(c.architectures or [c.model_type])[0]}":
                c.model_type not in ("llama", "mistral", "qwen2", "qwen3"),
            f"rope type {rope.get('rope_type')!r}": rope.get("rope_type") not in ROPE_KEYS,
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
            "sliding-window attention": getattr(c, "sliding_window", None) or windows,
            f"hidden_act {c.hidden_act!r}": c.hidden_act != "silu",
            "a quantized checkpoint": getattr(c, "quantization_config", None),
            "transformers_weights": getattr(c, "transformers_weights", None),    # another file
            "is_causal = false": not getattr(c, "is_causal", True),
            f"dtype {c.dtype}": c.dtype not in (torch.bfloat16, torch.float16, torch.float32)}
    except Exception as e:                       # whatever transformers and its validators raise
        raise InputError(f"{path}: not a model configuration ({str(e)[:200]})")
    for feature in (feature for feature, found in unsupported.items() if found):
        raise InputError(f"{path}: {feature} is not supported (Llama, Mistral, Qwen2 and Qwen3 "
                         "without sliding window are)")
    sizes = {key: getattr(c, key) for key in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "intermediate_size", "max_position_embeddings")}
    factors = {key: rope.get(key) for key in ROPE_KEYS[rope["rope_type"]]}
    factors["rms_norm_eps"] = c.rms_norm_eps
    if not (all(type(v) is int and 0 < v <= 2**24 for v in sizes.values())
            and all(isinstance(v, int | float) and 0 < v < math.inf for v in factors.values())
            and c.num_attention_heads % c.num_key_value_heads == c.head_dim % 2 == 0):
        raise InputError(f"{path}: values that no model has: {sizes | factors}")
    return c

def load_tensors(path):
    """Return {name: tensor} of a safetensors file. Raises InputError if damaged or quantized."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: missing or damaged ({e}); download or write it again")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            raise InputError(f"{path}: {name} is {tensor.dtype}; quantized weights are refused")
    return tensors

def read_tensors(folder):
    """Return {name without "model.": tensor} of model.safetensors or, where there is none, of the
    shards that its index names, as transformers does; no other file counts. Raises InputError for a
    tensor that two shards have with different content."""
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if not (folder / files[0]).exists():
        if not index.exists():
            raise InputError(f"{folder}: no model.safetensors in it, and no {index.name} (other "
                             "formats can run code when loaded and are refused)")
        weight_map = read_json(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and (folder / file).parent == folder for file in files):
        raise InputError(f"{index}: damaged, or names a file outside of its folder")
    tensors, file_of = {}, {}
    for file in sorted(set(files)):
        for name, tensor in load_tensors(folder / file).items():
            name = name.removeprefix("model.")
            if name.endswith("rotary_emb.inv_freq"):              # old checkpoints store it
                continue
            if name in tensors and not torch.equal(tensors[name], tensor):
                raise InputError(f"{folder}: {name} is in {file_of[name]} and, with other values, "
                                 f"in {file}; which one is right?")
            tensors[name], file_of[name] = tensor, file
    return tensors

def may_have_bias(config, layer):
    """Tell whether transformers may give a linear layer, such as "mlp.up_proj", a bias."""
    if config.model_type == "qwen2":
        return layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    key = "mlp_bias" if layer.startswith("mlp.") else "attention_bias"
    return config.model_type != "mistral" and getattr(config, key, False)

def load_weights(folder, device, dtype, quantize=None):
    """Build the Decoder of a Hugging Face folder, in eval mode and frozen. Layer after layer goes
    to the device and is quantized there, from files that are mapped.

    The rule: what transformers would compute, or InputError. Every tensor must be one that it has,
    none may be missing but a bias, which is 0 there, and all shapes must be right."""
    config, tensors = read_config(folder), read_tensors(folder)
    head, embedding = tensors.get("lm_head.weight"), tensors.get("embed_tokens.weight")
    tied = config.tie_word_embeddings
    if tied and head is not None:                    # stored twice, or as transformers 5: not tied
        tied = embedding is not None and torch.equal(head.to(dtype), embedding.to(dtype))
        if tied:
            del tensors["lm_head.weight"]
    found = (re.fullmatch(r"layers\.0\.(.+)\.bias", name) for name in tensors)
    biased = {match[1] for match in found if match and may_have_bias(config, match[1])}
    with torch.device("meta"):
        model = Decoder(config, biased, config.model_type == "qwen3", tied)
    try:
        model.load_state_dict(tensors, assign=True)
        for name, module in list(model.named_modules()):
            if not any(module.children()):
                module.to(device, dtype)
            if quantize and name.startswith("layers.") and isinstance(module, Linear):
                bias = None if module.bias is None else module.bias.detach()
                model.set_submodule(name, QuantizedLinear(module.weight.detach(), bias))
    except ImportError as e:
        raise InputError(f"--quantize {quantize}: {e}")
    except (RuntimeError, ValueError) as e:
        raise InputError(f"{folder}: its weights do not fit config.json or these flags ({e})")
    return model.eval().requires_grad_(False)

def load_tokenizer(folder):
    """Return the tokenizer of a model folder, for an adapter without one that of the base model.
    Raises InputError if it cannot be loaded."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    folder = Path(folder)
    if (folder / "adapter_config.json").exists() and not any(folder.glob("tokenizer*")):
        folder = resolve_model(read_adapter(folder)["base"]).folder
    # tokenizer.json as it is: what transformers' own classes make of it depends on the version.
    fast = (folder / "tokenizer.json").exists()
    try:
        loader = PreTrainedTokenizerFast if fast else AutoTokenizer
        return loader.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({e})")

# PEFT's keys (0.21) that do not change what a saved adapter computes, and values of others.
ADAPTER_NOTES = ("target_modules exclude_modules layers_to_transform layers_pattern task_type "
                 "auto_mapping peft_version inference_mode revision lora_dropout fan_in_fan_out "
                 "use_rslora eva_config corda_config loftq_config lora_ga_config merge_weights "
                 "qalora_group_size velora_config ensure_weight_tying megatron_config "
                 "megatron_core runtime_config _from_model_config").split()
ADAPTER_VALUES = {"bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}

def read_adapter(folder):
    """Read adapter_config.json of a LoRA adapter, with `base`, the base model's name. Raises
    InputError for a key that changes the arithmetic and is not supported, and for an unknown one
    unless it is off. Which layers are adapted is told by the tensors, not by target_modules."""
    path = Path(folder) / "adapter_config.json"
    adapter = read_json(path)
    kinds = {"base_model_name_or_path": str, "r": int, "lora_alpha": int | float, "peft_type": str}
    if not (all(isinstance(adapter.get(key), kind) for key, kind in kinds.items())
            and adapter["peft_type"] == "LORA" and type(adapter["r"]) is int
            and 1 <= adapter["r"] < 2**16 and math.isfinite(adapter["lora_alpha"])):
        raise InputError(f"{path}: not a LoRA adapter's configuration: needs {', '.join(kinds)}; "
                         f"found peft_type {adapter.get('peft_type')!r}")
    for key, value in adapter.items():
        known = key in (*kinds, *ADAPTER_NOTES) or value in ADAPTER_VALUES.get(key, ())
        if value and not known:
            raise InputError(f"{path}: {key} = {value!r} is not supported")
    base, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    adapter["base"] = base if Path(base).exists() or not revision else f"{base}@{revision}"
    rank_stabilized = adapter.get("use_rslora")      # alpha / sqrt(r) instead of alpha / r
    adapter["alpha"] = adapter["lora_alpha"] * (adapter["r"] ** 0.5 if rank_stabilized else 1)
    if (resolve_model(adapter["base"]).folder / "adapter_config.json").exists():
        raise InputError(f"{path}: its base model is an adapter too")
    return adapter

@functools.cache                                     # it says so once
def default_dtype(device):
    """Return the dtype of weights on a "cpu", "mps" or "cuda": float32 but on a CUDA device, which
    has bfloat16, or is older (T4, V100) and has float16."""
    if device != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    print("--dtype float16: this GPU has no bfloat16", file=sys.stderr)
    return torch.float16

def load_model(name, device=None, dtype=None, quantize=None):
    """Load a model by its name (see `resolve_model`) -> (Decoder in eval mode, tokenizer). A PEFT
    LoRA folder gives the base model with the adapter on it.

    device: default CUDA if there is one. dtype: default see `default_dtype`. quantize: "nf4" for
    the linear layers of the blocks. Raises InputError for anything missing, damaged or
    unsupported."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.index:
        torch.cuda.set_device(device)                # Triton launches on the current one
    dtype = dtype or default_dtype(device.type)
    name, folder = resolve_model(name)
    if (folder / "adapter_config.json").exists():
        adapter = read_adapter(folder)
        model, _ = load_model(adapter["base"], device, dtype, quantize)
        tensors = load_tensors(folder / "adapter_model.safetensors")
        layers = [name for name, _ in model.named_modules()
                  if f"base_model.model.model.{name}.lora_A.weight" in tensors]
        if not layers:
            raise InputError(f"{folder}: its adapter has no LoRA of a layer of the model")
        add_lora(model, adapter["r"], adapter["alpha"], 0.0, layers)
        load_lora(model, tensors, folder)
        model.name, model.hash = name, f"{model.hash}+{model_hash(folder)}"
    else:
        model = load_weights(folder, device, dtype, quantize)
        model.name, model.folder = name, folder
        model.hash = model_hash(folder) + (f"-{quantize}" if quantize else "")
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > (size := model.config.vocab_size):
        raise InputError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {size}")
    eos = generation_defaults(model.folder).get("eos_token_id", model.config.eos_token_id)
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = eos if isinstance(eos, list) else [eos]
    if not eos or not all(type(i) is int and 0 <= i < size for i in eos):
        raise InputError(f"{folder}: eos_token_id, of generation_config.json, config.json or the "
                         f"tokenizer, is {eos}: expected ids of tokens")
    model.eos_ids = frozenset(eos)
    return model.eval(), tokenizer

def generation_defaults(folder):
    """Return generation_config.json as a dict, {} if there is none."""
    path = Path(folder) / "generation_config.json"
    found = read_json(path) if path.exists() else {}
    return {key: value for key, value in found.items() if value is not None}

def free_memory():
    """Give memory that nothing refers to back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()                         # does nothing without a GPU

@contextlib.contextmanager
def new_folder(folder):
    """Give a new folder to fill, which then takes the place of `folder` by renaming: readers see
    the old one, for a moment none, or the new one, whole, and writers do not meet."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".tmp", f".{folder.name}.", folder.parent, True) as beside:
        new = Path(beside) / "new"
        new.mkdir()                                  # with the permissions that umask gives
        yield new
        for i in range(99):                          # others may put theirs there in between
            with contextlib.suppress(OSError):
                os.rename(folder, f"{beside}/{i}")
            with contextlib.suppress(OSError):
                return os.rename(new, folder)
        os.rename(new, folder)

def save_model(model, folder):
    """Write a full Hugging Face folder, with the config, tokenizer and dtype of the source. LoRA
    must have been merged, and the weights must not be quantized."""
    assert not any(isinstance(m, LoRALinear | QuantizedLinear) for m in model.modules())
    with new_folder(folder) as new:
        for path in model.folder.iterdir():
            if path.suffix in (".json", ".jinja", ".model", ".txt") and ".index." not in path.name:
                shutil.copyfile(path, new / path.name)
        tensors = {}
        for name, tensor in model.state_dict().items():
            name = name if name == "lm_head.weight" else f"model.{name}"
            tensors[name] = tensor.detach().to(model.config.dtype).contiguous()
        save_file(tensors, new / "model.safetensors", {"format": "pt"})

# --------------------------------------------------------------------------------------------------
# The frame of a script

class InputError(ValueError):
    """What a person can mend. The text is one line: what, in which file and row, what to do."""

# Unicode's Default_Ignorable_Code_Point beyond its format characters, and Braille's blank cell.
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f"
                       "\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]")

def is_hidden(c):
    """Tell whether a character shows nothing: default-ignorable, control, format, line end."""
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") or INVISIBLE.match(c)

def escape_control_chars(text):
    """Return text that is safe to show: hidden characters become \\x1b and the like. \\n stays."""
    return "".join(ascii(c)[1:-1] if is_hidden(c) and c != "\n" else c for c in str(text))

def cli(main):
    """Run a script's main(). An error is one line, and exit code 2 if a person can mend it, 1 if it
    is a fault in here, 141 if stdout's reader has left, 130 and 143 after Ctrl-C and SIGTERM.
    THINKSAFE_DEBUG=1 shows the traceback."""
    def on_sigterm(*_):
        raise SystemExit(143)
    signal.signal(signal.SIGTERM, on_sigterm)
    for name in ("stdin", "stdout", "stderr"):       # `>&-`: else a file of rows would be stdout
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))
    with contextlib.suppress(AttributeError):        # a terminal may know no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    error, code = None, 0
    try:
        main()
    except SystemExit as e:
        code = e.code
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        code = 130
    except BaseException as e:                       # a panic of tokenizers is no Exception
        error, code = str(e) or type(e).__name__, 2
        if isinstance(e, torch.OutOfMemoryError):
            error = f"out of GPU memory; use fewer --slots or --pack-tokens ({e})"
        elif not isinstance(e, InputError | OSError | SafetensorError | MemoryError):
            error, code = f"{type(e).__name__}: {error:.300} (THINKSAFE_DEBUG=1 shows more)", 1
        if "THINKSAFE_DEBUG" in os.environ:
            traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not code or error == str(e):              # `| head` has read enough, or the disk is full
            error, code = (None, 141) if isinstance(e, BrokenPipeError) else (str(e), 2)
    if error:
        print("error: " + escape_control_chars(" ".join(error.split())[:900]), file=sys.stderr)
    raise SystemExit(code)

@contextlib.contextmanager
def progress(what, total, unit, done=0):
    """Show on stderr how far a stage is: on a terminal a bar, in a log a line every 30 seconds.
    Yields advance(n=1, tokens=0, note=""): call it for n finished units with their tokens, and a
    note to show beside the rate. total, done: units in all, and finished in earlier runs."""
    began = shown_at = time.time()
    now, n_tokens = done, 0
    with tqdm(total=total, initial=done, unit=unit, desc=what, disable=None) as bar:
        def advance(n=1, tokens=0, note=""):
            nonlocal now, shown_at, n_tokens
            now, n_tokens, t = now + n, n_tokens + tokens, time.time()
            rate = f"{n_tokens / max(t - began, 1e-9):,.0f} tokens/s" if n_tokens else ""
            bar.set_postfix_str(", ".join(filter(None, (rate, note))), refresh=False)
            bar.update(n)
            if bar.disable and t >= shown_at + 30:
                shown_at = t
                print(tqdm.format_meter(now, total, t - began, 0, what, unit=unit, initial=done,
                                        postfix=bar.postfix), file=sys.stderr, flush=True)
        yield advance

class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines, and shows the default of each flag that has one."""

    def _get_help_string(self, action):
        default = action.default
        hidden = default is None or default is False or default in (argparse.SUPPRESS, ())
        return action.help + ("" if hidden else " (default: %(default)s)")

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")

def bounded(kind, low, high=math.inf):
    """Return an argparse type: a finite int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__
    return parse

positive, seed_value = bounded(int, 1), bounded(int, 0, 2**31)

def make_parser(doc):
    """Return an ArgumentParser with the flags of every stage, in its group `machine`."""
    p = Parser(description=doc, formatter_class=HelpFormatter)
    gpu, mac = torch.cuda.is_available(), torch.backends.mps.is_available()
    p.machine = g = p.add_argument_group("folder and machine")
    g.add_argument("--out", type=Path, default=Path("out"), help="folder of all stages of a run")
    g.add_argument("--device", choices=["cpu", *["cuda"] * gpu, *["mps"] * mac],
                   default="cuda" if gpu else "cpu",
                   help="torch device; CUDA_VISIBLE_DEVICES says which GPU")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="of the weights; auto: float32 on a CPU, on a GPU bfloat16 if it has that, "
                        "else float16")
    g.add_argument("--quantize", choices=("nf4",), help="keep the models' linear layers in 4 bits, "
                   "by bitsandbytes: less memory, not faster")
    return p

def choose_dtype(args):
    """Return the dtype that --dtype names."""
    return default_dtype(args.device) if args.dtype == "auto" else getattr(torch, args.dtype)

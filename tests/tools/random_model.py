"""
A model folder of a real shape with random weights, and rows to train it on: for measuring where nothing can be downloaded.

    python tests/tools/random_model.py qwen3-0.6b FOLDER     # config, tokenizer, weights, rows.jsonl (256 rows of about 1,000 tokens)

The tokenizer is the tiny world's: its ids are the first 1,024 of the vocabulary. `random_model` makes the model without a folder,
on the device itself.
"""
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from safetensors.torch import save_file

from thinksafe import LABELS, TINY, Decoder, Linear, QuantizedLinear, load_tokenizer, read_config
from tiny import world

QWEN3 = dict(model_type="qwen3", head_dim=128, num_key_value_heads=8, vocab_size=151936, rope_theta=1e6, tie_word_embeddings=True)
SHAPES = {
    "qwen3-0.6b": dict(QWEN3, num_hidden_layers=28, hidden_size=1024, num_attention_heads=16, intermediate_size=3072),
    "qwen3-1.7b": dict(QWEN3, num_hidden_layers=28, hidden_size=2048, num_attention_heads=16, intermediate_size=6144),
    "qwen3-4b": dict(QWEN3, num_hidden_layers=36, hidden_size=2560, num_attention_heads=32, intermediate_size=9728),
}


def random_model(shape, device, dtype, quantize=None, seed=0):
    """A Decoder of a shape with random weights, made on the device in seconds, and the tiny tokenizer. `config` is transformers' too."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), shape)
        config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config, qk_norm=True)
    torch.manual_seed(seed)
    for name, module in list(model.named_modules()):
        if not any(module.children()):
            module.to_empty(device=device).to(dtype)
            for p in module.parameters():
                torch.nn.init.ones_(p) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.02)
            if quantize and isinstance(module, Linear):
                model.set_submodule(name, QuantizedLinear(module.weight.detach(), None))
    model.eos_ids, model.name, model.folder = frozenset(), shape, TINY / "student"
    return model.eval().requires_grad_(False), load_tokenizer(TINY / "student")


def write_config(folder, shape):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TINY / "student" / name, folder / name)
    config = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "hidden_act": "silu",
              "dtype": "bfloat16", **SHAPES[shape]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_random_model(folder, shape, seed=0):
    write_config(folder, shape)
    with torch.device("meta"):
        empty = Decoder(read_config(folder), qk_norm=True).state_dict()
    gen = torch.Generator().manual_seed(seed)
    tensors = {f"model.{name}": torch.ones(t.shape, dtype=torch.bfloat16) if t.dim() == 1 else
               torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=gen) for name, t in empty.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_rows(path, n=256, steps=150, seed=0):
    """Rows as guard.py writes them; 150 steps of reasoning are about 1,000 tokens."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        thought = " ".join(rng.choices(world.STEPS, k=steps)).replace("{obj}", "it")
        rows.append({"id": str(i), "instruction": f"How do I do number {i}?", "prompt_label": LABELS[i % 4], "response_label": "safe",
                     "response": f"<think>\n{thought}\n</think>\n\nDone.", "finish_reason": "stop"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return rows


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__.strip())
    write_random_model(Path(sys.argv[2]), sys.argv[1])
    write_rows(Path(sys.argv[2]) / "rows.jsonl")

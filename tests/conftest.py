import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")        # no test asks the hub for anything
if "PYTEST_XDIST_WORKER" in os.environ:             # one core for each of several test processes
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # kernels run in Triton's interpreter; read when triton is imported

from thinksafe import add_lora, load_model, load_tokenizer, lora_tensors


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def tries(request):
    """f(kind): a context in which one "fault" or "attack" is tried; it held if the block ends. Counted for the summary."""
    counts = {}
    request.node.user_properties.append(("trust", counts))

    @contextlib.contextmanager
    def one(kind):
        tried = counts.setdefault(kind, [0, 0])
        tried[0] += 1
        yield
        tried[1] += 1
    return one


def pytest_terminal_summary(terminalreporter):
    tried, held = {}, {}
    for report in (r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, ()) if r.when == "call"):
        for name, value in report.user_properties:
            for kind, (n, ok) in value.items() if name == "trust" else ():
                tried[kind], held[kind] = tried.get(kind, 0) + n, held.get(kind, 0) + ok
            if name == "measured":
                terminalreporter.write_line(value)
    if tried:
        terminalreporter.write_line("trust: " + ", ".join(f"{held[kind]:,} of {n:,} {kind}s held" for kind, n in sorted(tried.items())))


FAMILIES = {
    "llama": dict(model_type="llama"),
    "llama_untied_bias": dict(model_type="llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama3_rope": dict(model_type="llama", rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}, max_position_embeddings=512),
    "mistral": dict(model_type="mistral", sliding_window=None, tie_word_embeddings=False, head_dim=24),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=32),
}


def small_hf_model(family, vocab=1024, seed=0):
    """A random transformers model of the family, fp32 on the CPU; norms and biases are random too, so that none is idle."""
    from transformers import AutoConfig, AutoModelForCausalLM
    shape = dict(vocab_size=vocab, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=96, max_position_embeddings=512, tie_word_embeddings=True)
    shape.update(FAMILIES[family])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.15 * torch.randn_like(p))
    return model


@pytest.fixture(scope="session")
def tiny():
    return load_model("tiny", "cpu", torch.float32)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """f(family) -> (transformers model, folder with it and the tiny tokenizer)."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = small_hf_model(family)
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                (folder / name).write_bytes((ROOT / "tiny" / "student" / name).read_bytes())
            made[family] = model, folder
        return made[family]
    return get


@pytest.fixture
def student_with_lora(folders):
    """-> (model, tokenizer): a small random student with LoRA on it that is not zero."""
    model, tokenizer = load_model(folders("qwen3")[1], "cpu", torch.float32)
    torch.manual_seed(0)
    add_lora(model, 4, 8, 0.0, ("q_proj", "v_proj", "up_proj"))
    for p in lora_tensors(model).values():
        p.normal_(std=0.1)
    return model, tokenizer


@pytest.fixture
def tokenizer():
    return load_tokenizer(ROOT / "tiny" / "tokenizer")


@pytest.fixture
def opened():
    """A tokenizer whose template opens <think> itself, as R1's does."""
    tokenizer = load_tokenizer(ROOT / "tiny" / "tokenizer")
    tokenizer.chat_template = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n{{ '<think>\n' }}"
    return tokenizer


def command(script):
    """The words behind `python` that run a script or a module of the repository."""
    return [str(ROOT / script)] if script.endswith(".py") else ["-m", script]


def run(script, *args, cwd=ROOT, check=True, timeout=900, **kw):
    """Run a script as a user does -> CompletedProcess; with check, its last line as JSON is in `.json`.

    script: "sample.py", or "extras.chat" for python -m extras.chat."""
    done = subprocess.run([sys.executable, *command(script), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout, **kw)
    if check:
        assert done.returncode == 0, done.stderr
        done.json = json.loads(done.stdout.strip().splitlines()[-1])
    return done


def call(script, *args):
    """Run a script's command line inside this process (a fresh interpreter takes seconds) -> like `run` without check."""
    import importlib
    import io

    from data.sources import VERSIONS
    from thinksafe import cli
    VERSIONS.clear()                                              # a fresh interpreter has loaded nothing
    out, err, argv, handler = io.StringIO(), io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [script, *map(str, args)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    done = subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())
    if done.stdout.rstrip().endswith("}"):
        done.json = json.loads(done.stdout.strip().splitlines()[-1])
    return done


def on_a_terminal(*words, typed=""):
    """Run a command with all its streams on a terminal of 130 columns, where `typed` is typed -> (exit code, all that it showed)."""
    import pty
    import termios
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 130))
    job = subprocess.Popen([sys.executable, *map(str, words)], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT)
    os.close(slave)
    os.write(master, typed.encode())
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:                                           # the other end is closed
            break
    os.close(master)
    return job.wait(), shown.decode()


def killed_at(script, flags, path, lines, how=signal.SIGKILL):
    """Start a script and signal it as soon as `path` has so many lines -> its exit code."""
    process = subprocess.Popen([sys.executable, *command(script), *map(str, flags)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))     # a shell's & ignores it
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        time.sleep(0.001)
    process.send_signal(how)
    return process.wait()


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Folder of SmolLM2-135M-Instruct, a real model that nobody here made."""
    from smollm2 import write_smollm2
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        write_smollm2(folder)
    except ImportError as e:
        pytest.skip(f"no real weights here: {e}")
    return folder

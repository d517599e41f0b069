"""Our folder kernels/ and the hub's package of that name: each import finds what it means, with one, both, or two checkouts.

A folder without __init__.py yields to an installed package (PEP 420), and our modules are imported by their own names.
"""
import importlib.metadata
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
# What the libraries do that look for the hub's package when they are imported or make a model.
LIBRARIES = """
import bitsandbytes.optim, peft, torch, transformers.integrations.hub_kernels
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("qwen3", vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                              num_key_value_heads=1, intermediate_size=16, head_dim=16)
assert AutoModelForCausalLM.from_config(config)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 8)
"""


def run_code(code, *path, cwd=ROOT):
    """Run code as a script in cwd, with these folders on PYTHONPATH. It must succeed and print nothing to stderr."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def our_modules(root):
    """Code that imports our modules and asserts that they are those of a checkout."""
    return f"import thinksafe, {', '.join(MODULES)}\nfor module in ({', '.join(MODULES)}): assert module.__file__.startswith({str(root)!r})\n"


def installed():
    try:
        return importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def install_fake(site):
    """Write a package like the hub's, of a version that transformers takes."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION
    package, info = site / "kernels", site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (package / "__init__.py").write_text(f"from kernels.inner import get_kernel\n__version__ = '{KERNELS_MIN_VERSION}'\n")
    (package / "inner.py").write_text("def get_kernel(*args, **kwargs): raise RuntimeError('gemm_4bit_forward: no hub here')\n")


@pytest.mark.skipif(installed() is not None, reason="the hub's package is installed here")
@pytest.mark.parametrize("ours_first", [True, False])
def test_without_the_hubs_package_the_libraries_do_without_it(ours_first):
    pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    check = "from transformers.utils import is_kernels_available\nassert not is_kernels_available()\n"
    run_code(our_modules(ROOT) + check + LIBRARIES if ours_first else check + our_modules(ROOT))


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_hubs_package_is_found_where_it_is_installed(tmp_path, ours_first):
    pytest.importorskip("bitsandbytes")
    install_fake(tmp_path)
    hub = ("from transformers.utils import is_kernels_available\nassert is_kernels_available()\n"
           f"import kernels\nfrom kernels import get_kernel\nassert kernels.__file__.startswith({str(tmp_path)!r})\n")
    run_code(our_modules(ROOT) + hub + "import bitsandbytes.optim" if ours_first else hub + our_modules(ROOT), tmp_path)


def test_two_checkouts(tmp_path):
    """Each script has the kernels of its own folder, wherever the other one stands on the path."""
    other, site = tmp_path / "other", tmp_path / "site"
    other.mkdir()
    shutil.copytree(ROOT / "kernels", other / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "thinksafe.py", other)
    install_fake(site)
    check = "import kernels\nassert kernels.__file__\n"
    run_code(our_modules(ROOT) + check, other, site)
    run_code(our_modules(other) + check, site, ROOT, cwd=other)

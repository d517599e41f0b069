"""
Fused operations, one file each; they know tensors only.

The Hub's own package is called `kernels` too, and transformers and bitsandbytes import it when it is
there. From this repository's root our folder comes first on sys.path, so where that package is
installed it is loaded into this one: both `from kernels import get_kernel` and `from kernels.ce_kl
import ce_kl_loss` work. Where it is not, importing its names fails as it would without us.
"""
import importlib.machinery as _machinery
import logging as _logging
import os as _os
import sys as _sys

# bitsandbytes imports us to fetch a kernel that we do not need, and warns when it cannot.
_logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())

_root = _os.path.dirname(_os.path.dirname(_os.path.realpath(__file__)))
_hub = _machinery.PathFinder.find_spec("kernels", [p for p in _sys.path if _os.path.realpath(p or ".") != _root])
if _hub and _hub.origin:
    __path__.append(_os.path.dirname(_hub.origin))
    with open(_hub.origin, encoding="utf-8") as _f:
        exec(compile(_f.read(), _hub.origin, "exec"))

"""What Triton's interpreter does differently from a GPU, put right: for kernels with bf16 on a CPU."""
import contextlib
from unittest import mock

import numpy as np
import torch


@contextlib.contextmanager
def like_a_gpu():
    """In this context the interpreter rounds fp32 to bf16, which it would cut off, and multiplies bf16 as the numbers that
    they are, not as the integers of their bits."""
    from triton.runtime import interpreter
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(x, source, target, mode):
        if (source.name, target.name) == ("fp32", "bf16"):
            return torch.tensor(x).bfloat16().view(torch.uint16).numpy()
        return convert(x, source, target, mode)

    def widened(x):
        if x.dtype.scalar.name != "bf16":
            return x
        bits = np.ascontiguousarray(x.data).view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def product(self, a, b, *args):
        return dot(self, widened(a), widened(b), *args)

    with (mock.patch.object(interpreter, "_convert_float", rounded),
          mock.patch.object(interpreter.InterpreterBuilder, "create_dot", product)):
        yield

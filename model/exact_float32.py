"""float32 that is float32 on GPUs too."""

import os


def ask_for() -> None:
    """Of kernels that this process and its children will compile; what the user has set stays.

    Triton multiplies float32 as tf32, with ten bits of mantissa, unless told otherwise (triton/language/core.py, dot);
    vLLM's kernels for experts and for attention leave that to it. PyTorch's own products are float32.
    """
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

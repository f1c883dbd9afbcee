"""The Triton kernels. Each has a twin in plain PyTorch, which the tests hold it against."""

from functools import cache
from importlib.util import find_spec
from typing import Any

AVAILABLE = find_spec("triton") is not None  # the modules here import it
MAX_HEAD_DIM = 256  # of attention, flash-attn's too
FEW_ROWS = 16  # up to so many rows a step takes as long as reading the weights, if nothing comes between


def dependent_launch(num_rows: int) -> dict[str, Any]:
    """The launch options with which a kernel of few rows begins before the one before it has ended, where the GPU can do that."""
    is_dependent = num_rows <= FEW_ROWS and _has_dependent_launch()
    return {"IS_DEPENDENT": True, "launch_pdl": True} if is_dependent else {"IS_DEPENDENT": False}


@cache
def _has_dependent_launch() -> bool:
    import torch
    import triton

    interpreted = triton.knobs.runtime.interpret
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9 and not interpreted

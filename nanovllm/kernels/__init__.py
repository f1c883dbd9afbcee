"""The Triton kernels. Each has a twin in plain PyTorch, which the tests hold it against."""

from importlib.util import find_spec
from typing import Any

import torch

AVAILABLE = find_spec("triton") is not None  # the modules here import it
MAX_HEAD_DIM = 256  # of attention, flash-attn's too
FEW_ROWS = 16  # up to so many rows a step takes as long as reading the weights, if nothing comes between


def dependent_launch(num_rows: int) -> dict[str, Any]:
    """The launch options with which a kernel of few rows begins before the one before it has ended, where the current GPU can do
    that."""
    from nanovllm.kernels.gumbel import INTERPRETED

    if num_rows > FEW_ROWS or INTERPRETED.value or torch.cuda.get_device_capability()[0] < 9:
        return {"IS_DEPENDENT": False}
    return {"IS_DEPENDENT": True, "launch_pdl": True}

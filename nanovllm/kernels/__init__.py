"""The Triton kernels. Each has a twin in plain PyTorch, which the tests hold it against."""

from importlib.util import find_spec

AVAILABLE = find_spec("triton") is not None  # the modules here import it
MAX_HEAD_DIM = 256  # of attention, flash-attn's too

"""Published model shapes, which need no checkpoint: dummy weights are made from their config.json."""

from pathlib import Path
from typing import Any, NamedTuple

import transformers


class Shape(NamedTuple):
    """The published sizes of a model whose heads have 128 dimensions."""

    config_class: Any
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    vocab_size: int = 151936
    max_position_embeddings: int = 40960
    rope_theta: float = 1e6

    def save(self, folder: Path) -> None:
        """Write the config.json from which dummy weights are made."""
        sizes = self._asdict()
        del sizes["config_class"]
        self.config_class(**sizes, head_dim=128, dtype="bfloat16").save_pretrained(folder)


QWEN2, QWEN3, LLAMA = transformers.Qwen2Config, transformers.Qwen3Config, transformers.LlamaConfig
SHAPES = {
    "qwen3-0.6b": Shape(QWEN3, 28, 1024, 16, 8, 3072, True),
    "qwen3-1.7b": Shape(QWEN3, 28, 2048, 16, 8, 6144, True),
    "qwen3-4b": Shape(QWEN3, 36, 2560, 32, 8, 9728, True),
    "qwen3-8b": Shape(QWEN3, 36, 4096, 32, 8, 12288, False),
    "qwen3-14b": Shape(QWEN3, 40, 5120, 40, 8, 17408, False),
    "qwen3-32b": Shape(QWEN3, 64, 5120, 64, 8, 25600, False),
    "qwen2.5-7b": Shape(QWEN2, 28, 3584, 28, 4, 18944, False, 152064, 32768),
    "llama-3.1-8b": Shape(LLAMA, 32, 4096, 32, 8, 14336, False, 128256, 131072, 5e5),
}

"""A model of one's own: IBM Granite, which is Llama with four multipliers.

python examples/own_model.py                                              # a small random one, beside transformers
python examples/own_model.py --model ibm-granite/granite-3.3-2b-instruct "Who was Ada Lovelace?"

A subclass of Decoder says what is different; the loader finds the weights by the modules' names, which are Llama's.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig

from nanovllm import LLM, SamplingParams
from nanovllm.attention import AttentionBackend
from nanovllm.checks import check_choice
from nanovllm.config import ModelConfig
from nanovllm.engine.batch import Batch, KVCache
from nanovllm.layers.rotary import Rotary
from nanovllm.models.decoder import Attention, Decoder, DecoderLayer
from nanovllm.parallel.group import Group

MULTIPLIERS = "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"


@dataclass(frozen=True, kw_only=True)
class GraniteModelConfig(ModelConfig):
    embedding_multiplier: float
    attention_multiplier: float  # in place of head_dim^-0.5
    residual_multiplier: float
    logits_scaling: float


class GraniteAttention(Attention):
    """Queries are scaled, so that the backend's head_dim^-0.5 makes attention_multiplier of it."""

    def __init__(self, config: GraniteModelConfig, backend: AttentionBackend, group: Group):
        super().__init__(config, backend, group)
        self.q_size = group.share(config.num_attention_heads, config.head_dim).size
        self.scale = config.attention_multiplier * config.head_dim**0.5

    def attend(self, qkv: Tensor, rotary: Rotary, cache: KVCache, batch: Batch) -> Tensor:
        qkv[:, : self.q_size] *= self.scale
        return super().attend(qkv, rotary, cache, batch)


class GraniteLayer(DecoderLayer):
    def __init__(self, config: GraniteModelConfig, backend: AttentionBackend, group: Group):
        super().__init__(config, backend, group)
        self.self_attn = GraniteAttention(config, backend, group)
        self.multiplier = config.residual_multiplier

    def forward(
        self, x: Tensor, residual: Tensor, rotary: Rotary, cache: KVCache, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        attention, mlp = self.self_attn, self.mlp
        qkv, residual = attention.qkv_proj.after_norm(self.input_layernorm, x, residual)
        x = attention.o_proj(attention.attend(qkv, rotary, cache, batch)) * self.multiplier
        hidden, residual = mlp.gate_up_proj.after_norm(self.post_attention_layernorm, x, residual)
        return mlp.down_proj(hidden) * self.multiplier, residual


class Granite(Decoder):
    layer_class = GraniteLayer

    @staticmethod
    def read_config(hf: Any) -> GraniteModelConfig:
        """Everything but the multipliers is read as Llama's."""
        check_choice("model_type of the checkpoint", hf.model_type, ("granite",))
        fields = hf.to_dict()
        multipliers: dict[str, Any] = {name: float(fields[name]) for name in MULTIPLIERS}
        llama = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
        return GraniteModelConfig(**vars(ModelConfig.from_hf(LlamaConfig(**llama))), **multipliers)

    def __init__(self, config: GraniteModelConfig, backend: AttentionBackend, group: Group, max_len: int):
        super().__init__(config, backend, group, max_len)
        self.config = config

    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids) * self.config.embedding_multiplier

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden) / self.config.logits_scaling


def make_random(folder: str | Path, **changes: Any) -> GraniteForCausalLM:
    """Save a small Granite with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
    multipliers = dict(zip(MULTIPLIERS, (12.0, 0.1, 0.22, 8.0), strict=True))
    model = GraniteForCausalLM(GraniteConfig(**sizes | heads | multipliers | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    model.save_pretrained(folder)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--model", help="folder or Hub id of a Granite model (default: a small random one)")
    args = parser.parse_args(argv)
    if args.model:
        with LLM(args.model, model_class=Granite) as llm:
            (output,) = llm.chat([{"role": "user", "content": args.question}], SamplingParams(temperature=0))
            return print(output["text"])

    prompt = list(range(20))
    with TemporaryDirectory() as folder:
        theirs = make_random(folder).generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
        with LLM(folder, model_class=Granite, device="cpu", use_tqdm=False) as llm:
            (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    print(f"transformers: {theirs[0, len(prompt) :].tolist()}\nnanovllm:     {output['token_ids']}")


if __name__ == "__main__":
    main()

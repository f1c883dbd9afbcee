"""The decoder: Qwen3, Qwen2 and Llama. They differ in flags: q/k-norm, biases, rotary scaling, a tied head.

Module names are the checkpoints' names, so that the loader needs no table. The model knows tokens, positions and
paged KV; it does not know requests.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.attention import AttentionBackend
from nanovllm.config import ModelConfig
from nanovllm.engine.batch import Batch, KVCache
from nanovllm.layers.linear import ColumnParallelLinear, Linear, ParallelEmbedding, RowParallelLinear, vocabulary_share
from nanovllm.layers.rotary import Rotary, RotaryEmbedding
from nanovllm.parallel.group import Group


class Attention(nn.Module):
    """Grouped-query attention: H query heads share H_kv key-value heads of size D; a rank has its share of both."""

    def __init__(self, config: ModelConfig, backend: AttentionBackend, group: Group):
        super().__init__()
        self.backend = backend
        self.head_dim = config.head_dim
        q = group.share(config.num_attention_heads, config.head_dim)
        kv = group.share(config.num_key_value_heads, config.head_dim)
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, parts, config.qkv_bias, config.dtype)
        self.o_proj = RowParallelLinear(q, config.hidden_size, config.o_bias, config.dtype, group)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps, dtype=config.dtype)
            self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps, dtype=config.dtype)
        self.norms = (self.q_norm, self.k_norm) if config.qk_norm else None

    @torch.compiler.disable  # it has its own kernels, and writes to a cache that a compiler might copy
    def attend(self, qkv: Tensor, rotary: Rotary, cache: KVCache, batch: Batch) -> Tensor:
        """From [T, (H + 2 H_kv) D], what `qkv_proj` gives, to [T, H D], what `o_proj` takes."""
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        q = self.backend.store(qkv, self.norms, rotary, cache.k, cache.v, batch)
        return self.backend.attend(q, cache.k, cache.v, batch).flatten(1)


class MLP(nn.Module):
    """The two products of the gated feed-forward network, which the decoder layer runs."""

    def __init__(self, config: ModelConfig, group: Group):
        super().__init__()
        share = group.share(config.intermediate_size)
        parts = {"gate_proj": share, "up_proj": share}
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size, parts, config.mlp_bias, config.dtype, is_gated=True
        )
        self.down_proj = RowParallelLinear(share, config.hidden_size, config.mlp_bias, config.dtype, group)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, backend: AttentionBackend, group: Group):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=config.dtype)
        self.self_attn = Attention(config, backend, group)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=config.dtype)
        self.mlp = MLP(config, group)

    def forward(
        self, x: Tensor, residual: Tensor, rotary: Rotary, cache: KVCache, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """`x` is what the layer before adds to the residual stream: it is added where it is read, with the norm.

        torch.compile cuts the layer in two where it calls `attend`. Were that called by a module of the layer, it would be
        four pieces, which take longer to launch.
        """
        attention, mlp = self.self_attn, self.mlp
        qkv, residual = attention.qkv_proj.after_norm(self.input_layernorm, x, residual)
        x = attention.o_proj(attention.attend(qkv, rotary, cache, batch))
        hidden, residual = mlp.gate_up_proj.after_norm(self.post_attention_layernorm, x, residual)
        return mlp.down_proj(hidden), residual


class Decoder(nn.Module):
    """Token ids to logits. Parameters are unfilled, on the default device, until the loader fills them.

    A model of one's own is a subclass: `LLM(model, model_class=...)`.
    """

    layer_class: type[nn.Module] = DecoderLayer

    @staticmethod
    def read_config(hf: Any) -> ModelConfig:
        """The sizes and flags that a transformers config asks for; a subclass may read what this engine does not know."""
        return ModelConfig.from_hf(hf)

    def __init__(self, config: ModelConfig, backend: AttentionBackend, group: Group, max_len: int):
        super().__init__()
        self.embed_tokens = ParallelEmbedding(config.vocab_size, config.hidden_size, config.dtype, group)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, max_len)
        self.layers = nn.ModuleList(self.layer_class(config, backend, group) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=config.dtype)
        parts = {"lm_head": vocabulary_share(config.vocab_size, group)}
        self.lm_head = ColumnParallelLinear(config.hidden_size, parts, False, config.dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.requires_grad_(False)
        self.group, self.vocab_size = group, config.vocab_size
        self.run_layer = self.layer_class.forward  # of any layer, so that one compilation serves all
        self.is_compiled = False
        self.max_few_rows = 0

    def compile_layers(self) -> None:
        """Compile what every layer runs, once for any number of tokens but few, for which the products have a kernel of their own."""
        self.run_layer = torch.compile(self.layer_class.forward, dynamic=True)
        self.is_compiled = True
        if self.group.size > 1:  # the sums over ranks have not been tried between kernels that overlap
            return
        from nanovllm.kernels.few_rows import most_rows

        self.max_few_rows = most_rows(len(self.norm.weight), self.norm.weight.dtype, has_norm=True)
        for module in self.modules():
            if isinstance(module, Linear):
                module.max_few_rows = min(self.max_few_rows, most_rows(module.weight.shape[1], module.weight.dtype))
        self.lm_head.max_few_rows = 1

    def forward(self, batch: Batch, kv_cache: list[KVCache]) -> Tensor:
        """Compute a step: hidden states [T, hidden] of its tokens, whose keys and values go to the layers' caches."""
        x = self.embed(batch.input_ids)
        residual = torch.zeros_like(x)
        rotary = self.rotary(batch.positions)
        run_layer = self.layer_class.forward if len(x) <= self.max_few_rows else self.run_layer
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            x, residual = run_layer(layer, x, residual, rotary, cache, batch)
        return residual + x

    def embed(self, input_ids: Tensor) -> Tensor:
        """What the first layer is given, [T, hidden], of token ids [T]."""
        return self.embed_tokens(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [S, vocabulary] of hidden states [S, hidden] that `forward` returned; all of them on rank 0 only."""
        logits, _ = self.lm_head.after_norm(self.norm, hidden)
        return self.group.gather(logits)[:, : self.vocab_size]

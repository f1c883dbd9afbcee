"""The ceiling of a workload: the work that no exact engine avoids, at the rates that this card reaches."""

import statistics
from typing import NamedTuple

import torch

from nanovllm.config import ModelConfig
from tools.watchers import DeviceTimer
from tools.workloads import Prefix, Workload


class LeastWork(NamedTuple):
    """What no exact engine avoids for some requests."""

    kv_bytes: int
    weight_bytes: int
    prompt_flops: int


def least_work(model: ModelConfig, workload: Workload) -> LeastWork:
    """KV and weights that have to be read, and the arithmetic of the prompts.

    Computing a prompt gives the first output token; each further one reads its context's KV once. There are as many
    steps as the longest output has tokens, and each reads the weights. What requests or samples share is computed once, and in a
    step it is read once for all. What decoding computes is left out.
    """
    prompts, output_lens = workload.requests(0)
    num_shared = sum(num_tokens for _, num_tokens in workload.shared)
    own = [Prefix(num_shared, len(prompt), range(i, i + 1)) for i, prompt in enumerate(prompts)]
    prompt_tokens = attended_pairs = kv_tokens = 0
    for start, end, requests in [*workload.prefixes, *own]:
        prompt_tokens += end - start
        attended_pairs += (end**2 - start**2) // 2  # causal: half of all
        kv_tokens += (end - start) * max(output_lens[i] - 1 for i in requests)
    kv_tokens += workload.num_samples * sum(n * (n - 1) // 2 for n in output_lens)
    num_steps = max(output_lens)

    m = model
    projections = 2 * m.hidden_size * (m.num_attention_heads + m.num_key_value_heads) * m.head_dim  # q and o, k and v
    layers = m.num_hidden_layers * (projections + 3 * m.hidden_size * m.intermediate_size)
    kv_of_token = m.num_hidden_layers * 2 * m.num_key_value_heads * m.head_dim
    attention_flops = 2 * 2 * m.num_hidden_layers * m.num_attention_heads * m.head_dim * attended_pairs
    return LeastWork(
        kv_bytes=kv_tokens * kv_of_token * m.dtype.itemsize,
        weight_bytes=num_steps * (layers + m.vocab_size * m.hidden_size) * m.dtype.itemsize,
        prompt_flops=2 * layers * prompt_tokens + attention_flops,
    )


class Ceilings(NamedTuple):
    """What this card reaches in a plain copy and in a plain product."""

    bytes_per_s: float
    flop_per_s: float

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e12:.2f} TB/s in a copy, {self.flop_per_s / 1e12:.0f} TFLOP/s in a product"

    def limit_seconds(self, work: LeastWork) -> float:
        """All reads, and after them all arithmetic: engines that overlap the two gain a little on this limit."""
        return (work.kv_bytes + work.weight_bytes) / self.bytes_per_s + work.prompt_flops / self.flop_per_s


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy of 2 GB, each byte read and written, and a bfloat16 product of random 8192 × 8192 matrices."""
    source = torch.ones(2 * 10**9, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    timer = DeviceTimer(device)
    medians = []
    for launch, args in ((target.copy_, (source,)), (torch.mm, (a, b))):
        for _ in range(50):
            timer.call(launch, *args)
        medians.append(statistics.median(timer.take()))
    torch.cuda.reset_peak_memory_stats(device)
    return Ceilings(2 * source.nbytes / medians[0], 2 * 8192**3 / medians[1])

"""The same requests through transformers."""

import time
from typing import Any

import torch
import transformers

from nanovllm import LLM
from tools.workloads import Workload


def run_transformers(llm: LLM, workload: Workload, pass_number: int) -> float:
    """Seconds for one batch, padded on the left, that goes on until the longest output is there."""
    model, device, dtype = llm.config.model, llm.config.torch_device, llm.engine.model_config.dtype
    if llm.config.load_format == "dummy":
        config = transformers.AutoConfig.from_pretrained(model)
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        hf = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    hf.to(device)
    prompts, output_lens = workload.requests(pass_number)
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling: dict[str, Any] = {"do_sample": False, "num_return_sequences": workload.num_samples}
    if workload.temperature > 0:
        sampling |= {"do_sample": True, "temperature": workload.temperature, "top_k": 0}

    def generate(num_tokens: int) -> float:
        lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        start = time.perf_counter()
        hf.generate(input_ids=input_ids, attention_mask=mask, pad_token_id=0, **lengths, **sampling)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    generate(4)  # warms up
    return generate(max(output_lens))

"""Faithful to transformers: the same log-probabilities for every architecture, the same tokens for a real model."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers import greedy

from nanovllm import LLM, RequestOutput

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {  # rope as transformers 4 and 5 both read it
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-head-size-80": ("qwen3", {"head_dim": 80, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-size": ("llama", {"head_dim": 24}),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e3}),
    "llama3": ("llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "rope_theta": 1e4}),
    "yarn": ("qwen3", {"rope_scaling": YARN, "rope_theta": 1e6}),
    "yarn-mscale": ("qwen2", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}, "rope_theta": 1e4}),
    "yarn-factor": (
        "llama",
        {"rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "truncate": False}, "rope_theta": 1e4},
    ),
}


def hf_logprobs(model: transformers.PreTrainedModel, output: RequestOutput) -> torch.Tensor:
    """transformers' log-probabilities [completion tokens, vocabulary] of a prompt and its completion."""
    token_ids = output.prompt_token_ids + output["token_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids], device=model.device)).logits[0].float()
    return logits.log_softmax(-1)[len(output.prompt_token_ids) - 1 : -1].cpu()


def greedy_hf(folder: Path, prompts: list[list[int]], num_tokens: int, device: str) -> list[list[int]]:
    """transformers' greedy completions, padded on the left; tokens after an end of sequence are cut."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    longest = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    completions = out[:, longest:].tolist()
    eos = model.generation_config.eos_token_id
    return [c[: c.index(eos) + 1] if eos in c else c for c in completions]


TEXTS = [
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\n",
    "La capitale de l'Allemagne est",
    "Q: What is 2 + 2?\nA:",
    "The three laws of thermodynamics are:",
]


def varied_prompts(tokenizer: transformers.PreTrainedTokenizerBase) -> list[list[int]]:
    """32 prompts: plain text, chats, and texts of up to 300 tokens."""
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    chats = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    long = [" ".join(TEXTS[i:] + TEXTS[:i]) * (1 + i % 3) for i in range(8)]
    short = [text.split()[0] for text in TEXTS]
    return [tokenizer(text)["input_ids"] for text in [*TEXTS, *chats, *long, *short]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_equal_transformers(variant, tiny_model, device):
    family, changes = VARIANTS[variant]
    folder = tiny_model(family, **changes)
    llm = LLM(folder, max_model_len=128, max_num_seqs=4, device=device, use_tqdm=False)
    prompts = [[(7 * i + j * j) % 128 for j in range(n)] for i, n in enumerate((1, 5, 40, 100))]
    outputs = llm.generate(prompts, greedy(12, logprobs=-1), use_tqdm=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    for output in outputs:
        rows = [[candidates[i].logprob for i in range(len(candidates))] for candidates in output["logprobs"]]
        torch.testing.assert_close(torch.tensor(rows), hf_logprobs(model, output), atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_prompts", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_real_model_gives_the_tokens_of_transformers(num_prompts, demo_model, device):
    """Varied prompts, 64 greedy tokens each, in float32: all identical."""
    llm = LLM(demo_model, dtype="float32", device=device, max_model_len=512, use_tqdm=False)
    prompts = varied_prompts(llm.tokenizer)[:: 32 // num_prompts]
    outputs = llm.generate(prompts, greedy(64), use_tqdm=False)
    assert len(prompts) == num_prompts
    assert [output["token_ids"] for output in outputs] == greedy_hf(demo_model, prompts, 64, device)


def test_bfloat16_stays_close_to_float32(demo_model, device):
    """Mean |Δ log-probability| of the drawn tokens against transformers in float32 (whose own bfloat16 has 0.020)."""
    llm = LLM(demo_model, device=device, max_model_len=512, use_tqdm=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).to(device)
    errors = []
    for output in llm.generate(varied_prompts(llm.tokenizer)[::2], greedy(32, logprobs=0), use_tqdm=False):
        drawn = output["token_ids"]
        ours = torch.tensor([candidates[token].logprob for token, candidates in zip(drawn, output["logprobs"])])
        errors.append((ours - hf_logprobs(model, output)[torch.arange(len(drawn)), drawn]).abs())
    assert torch.cat(errors).mean() <= 0.05

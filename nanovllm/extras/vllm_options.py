"""What scripts for vLLM pass to `LLM(...)` beside this library's own options."""

from typing import Any

from nanovllm.checks import check_choice

OTHER_NAMES = {"block_size": "kvcache_block_size"}
CHANGE_NOTHING = ("disable_custom_all_reduce", "disable_log_stats", "download_dir", "max_logprobs", "swap_space")
DEFAULT_IS_NONE = ("max_num_batched_tokens", "max_num_seqs")
NO_LIMIT = 2**31 - 1  # None for max_model_len: the model's own limit
# Options that ask for nothing at this value, and why no other is taken.
ONLY = {
    "enable_chunked_prefill": (True, "every prompt may be cut into chunks"),
    "enable_lora": (False, "no adapter is loaded"),
    "kv_cache_dtype": ("auto", "keys and values are kept in the model's data type"),
    "pipeline_parallel_size": (1, "tensor_parallel_size cuts a model between GPUs"),
    "quantization": (None, "quantised weights are not run"),
    "tokenizer_mode": ("auto", "the tokenizer is what transformers loads"),
}


def translate(options: dict[str, Any]) -> dict[str, Any]:
    """The same options by this library's names, without those that ask for nothing.

    Raises:
        ValueError: for a value that cannot be honoured, with the reason.
    """
    ours = {}
    for name, value in options.items():
        if name in ONLY:
            only, reason = ONLY[name]
            if value != only or type(value) is not type(only):
                raise ValueError(f"{name} must be {only!r}, got {value!r}: {reason}")
        elif name in OTHER_NAMES:
            same = OTHER_NAMES[name]
            ours[same] = check_choice(f"{name} beside {same}", value, (options.get(same, value),))
        elif name == "max_model_len" and value is None:
            ours[name] = NO_LIMIT
        elif name not in CHANGE_NOTHING and not (name in DEFAULT_IS_NONE and value is None):
            ours[name] = value
    return ours

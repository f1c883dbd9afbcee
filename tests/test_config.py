"""Options, the reading of a checkpoint's config, and the arithmetic of the KV pool's memory."""

import json
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import psutil
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from nanovllm import LLM, SamplingParams
from nanovllm.attention import AttentionBackend
from nanovllm.config import Config, ModelConfig, RopeConfig
from nanovllm.engine.memory import GIB, available_host_memory, pool_bytes
from nanovllm.models.decoder import Decoder

NAN = float("nan")

# ---------------------------------------------------------------------------------------------------- options

# Every option: nano-vllm's and vLLM's default, what is allowed beside it, and what is refused.
OPTIONS = {
    "model": ("folder", [Path("folder"), "owner/name"], [None, 3, ["folder"]]),
    "enforce_eager": (False, [True], [1, 0, "yes", None]),
    "max_model_len": (4096, [1, numpy.int64(7)], [0, -1, "4", True, 4096.0, None]),
    "max_num_seqs": (512, [1, 2**20], [0, -1, "4", True, 1.5]),
    "max_num_batched_tokens": (16384, [1], [0, -1, "4", True, 1e4]),
    "gpu_memory_utilization": (0.9, [1e-3, 1, 1.0, numpy.float32(0.5)], [0, 0.0, -0.5, 1.5, NAN, "x", True, None]),
    "tensor_parallel_size": (1, [2], [0, -1, "1", True, 1.5]),
    "kvcache_block_size": (None, [1, 256], [0, -16, "16", False, 16.0]),
    "num_kvcache_blocks": (-1, [2], [0, 1, -2, "9", True, None]),
    "device": (
        "auto",
        ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)],
        ["tpu", "cuda:99", "meta", "cuda:x", None, 1.5],
    ),
    "dtype": (
        "auto",
        ["bfloat16", "float16", "float32", "half", "float", torch.bfloat16, torch.float16, torch.float32],
        ["int8", "float64", "bf16", None, torch.int8, torch.float64],
    ),
    "attention_backend": ("auto", ["reference"], ["nope", "", None, 1, AttentionBackend]),
    "model_class": (None, [Decoder], ["Decoder", 1, [Decoder]]),
    "enable_prefix_caching": (True, [False], [1, 0, "on", None]),
    "async_scheduling": (True, [False], [1, 0, "on", None]),
    "load_format": ("auto", ["dummy"], ["pt", "safetensors", None, True]),
    "seed": (None, [0, -1, 2**63 - 1], ["a", 1.0, True, 2**63, -(2**63) - 1]),
    "tokenizer": (None, ["owner/name", Path("folder")], [3, ["folder"], False]),
    "revision": (None, ["main"], [3, b"main", Path("main")]),
    "use_tqdm": (True, [False], [1, 0, None]),
    "trust_remote_code": (False, [True], [1, 0, "False", None]),
}
ALLOWED = [(name, value) for name, (default, more, _) in OPTIONS.items() for value in (default, *more)]
REFUSED = [(name, value) for name, (_, _, wrong) in OPTIONS.items() for value in wrong]


def test_the_defaults_are_nano_vllms_and_vllms():
    assert vars(Config.from_options("folder", {})) == {name: default for name, (default, _, _) in OPTIONS.items()}


@pytest.mark.parametrize(("name", "value"), ALLOWED, ids=str)
def test_an_allowed_value_is_kept(name, value):
    assert getattr(Config(**{"model": "folder", name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_a_wrong_value_is_refused_with_the_options_name_and_the_value(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}.*{re.escape(repr(value))}"):
        Config(**{"model": "folder", name: value})


@pytest.mark.parametrize(
    ("unknown", "hint"),
    [
        ("kv_cache_block_size", "did you mean 'kvcache_block_size'?"),
        ("backend", "did you mean 'attention_backend'?"),
        ("zzz", "known are " + ", ".join(list(OPTIONS)[1:])),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one_or_all(unknown, hint):
    with pytest.raises(TypeError, match=re.escape(f"'{unknown}'; {hint}") + "$"):
        Config.from_options("folder", {unknown: 1})


@pytest.mark.parametrize(
    ("passed", "ours"),
    [
        ({"block_size": 32}, {"kvcache_block_size": 32}),
        ({"block_size": 32, "kvcache_block_size": 32}, {"kvcache_block_size": 32}),
        ({"max_num_seqs": None, "max_num_batched_tokens": None, "max_model_len": 77}, {"max_model_len": 77}),
        ({"max_model_len": None}, {"max_model_len": 2**31 - 1}),
        ({"tokenizer": None, "seed": None}, {}),
        ({"disable_log_stats": True, "swap_space": 4, "disable_custom_all_reduce": True, "max_logprobs": 20}, {}),
        (
            {"download_dir": "/models", "dtype": "half", "trust_remote_code": True},
            {"dtype": "half", "trust_remote_code": True},
        ),
        ({"quantization": None, "tokenizer_mode": "auto", "kv_cache_dtype": "auto"}, {}),
        ({"pipeline_parallel_size": 1, "enable_lora": False, "enable_chunked_prefill": True}, {}),
    ],
    ids=str,
)
def test_options_of_vllm_are_ours_or_ask_for_nothing(passed, ours):
    assert Config.from_options("folder", passed) == Config(model="folder", **ours)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("quantization", "awq", "quantised weights"),
        ("tokenizer_mode", "slow", "what transformers loads"),
        ("kv_cache_dtype", "fp8", "the model's data type"),
        ("pipeline_parallel_size", 2, "tensor_parallel_size"),
        ("pipeline_parallel_size", True, "tensor_parallel_size"),
        ("enable_lora", True, "no adapter"),
        ("enable_chunked_prefill", False, "chunks"),
    ],
)
def test_other_values_of_vllms_options_are_refused_with_the_reason(option, value, reason):
    with pytest.raises(ValueError, match=rf"^{option} must be .*, got {value!r}: .*{reason}"):
        Config.from_options("folder", {option: value})


def test_an_option_by_two_names_has_one_value():
    with pytest.raises(ValueError, match=r"^block_size beside kvcache_block_size must be 16, got 32$"):
        Config.from_options("folder", {"block_size": 32, "kvcache_block_size": 16})


@pytest.mark.parametrize("wrong", ["max_model_length", "max_num_seqs"])
def test_options_are_checked_before_the_model_is_looked_for(wrong):
    with pytest.raises((TypeError, ValueError), match=wrong):
        LLM("/no/such/folder", **{wrong: 0})


@pytest.mark.parametrize(("has_cuda", "device"), [(False, "cpu"), (True, "cuda")])
def test_device_auto_is_cuda_if_there_is_a_gpu(monkeypatch, has_cuda, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert Config(model="folder").torch_device == torch.device(device)


def test_a_cuda_device_must_be_there(monkeypatch):
    for num_gpus, device, gpus in (0, "cuda", ""), (1, "cuda:1", " or 'cuda' or 'cuda:0'"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=num_gpus: n)
        with pytest.raises(ValueError, match=f"^device must be 'auto' or 'cpu' or 'cpu:0'{gpus}, got '{device}'$"):
            Config(model="folder", device=device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Config(model="folder", device="cuda:1").torch_device == torch.device("cuda:1")


def test_options_and_a_models_config_are_frozen_and_can_be_changed_by_a_copy():
    for config in Config(model="folder"), ModelConfig.from_hf(new_config()):
        with pytest.raises(FrozenInstanceError):
            config.dtype = torch.float32
        assert replace(config, dtype=torch.float32).dtype is torch.float32


# --------------------------------------------------------------------------------------- the checkpoint's config

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def old_config(**changes):
    """A Llama config as transformers 4 spells it: rope_theta beside rope_scaling, torch_dtype."""
    old = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 500000.0}
    return SimpleNamespace(**{**TINY, **old, "rope_scaling": None, "torch_dtype": torch.bfloat16, **changes})


def new_config(rope=None, **changes):
    """The same as transformers 5 spells it: rope_parameters, dtype."""
    rope_parameters = {"rope_type": "default", "rope_theta": 500000.0, **(rope or {})}
    given = {**TINY, "rope_parameters": rope_parameters, "dtype": "bfloat16", "eos_token_id": None, **changes}
    return LlamaConfig(**given)


FLAGS = ("qk_norm", "qkv_bias", "o_bias", "mlp_bias", "tie_word_embeddings")


def test_every_size_is_read():
    hf = Qwen3Config(**TINY, head_dim=16, tie_word_embeddings=True, dtype="float16")
    flags = dict.fromkeys(FLAGS, False) | {"qk_norm": True, "tie_word_embeddings": True}
    read = {"head_dim": 16, "rope": RopeConfig(theta=10000.0), "dtype": torch.float16, "eos_token_ids": frozenset()}
    assert ModelConfig.from_hf(hf) == ModelConfig(**TINY, **flags, **read)


@pytest.mark.parametrize(
    ("hf", "flags"),
    [
        (Qwen3Config(**TINY), {"qk_norm"}),
        (Qwen3Config(**TINY, attention_bias=True), {"qk_norm", "qkv_bias", "o_bias"}),
        (Qwen2Config(**TINY), {"qkv_bias"}),
        (LlamaConfig(**TINY), set()),
        (LlamaConfig(**TINY, attention_bias=True), {"qkv_bias", "o_bias"}),
        (LlamaConfig(**TINY, mlp_bias=True), {"mlp_bias"}),
        (LlamaConfig(**TINY, tie_word_embeddings=True), {"tie_word_embeddings"}),
        # A sliding window that no layer uses is none.
        (Qwen2Config(**TINY, use_sliding_window=False, sliding_window=16, max_window_layers=1), {"qkv_bias"}),
        (Qwen2Config(**TINY, use_sliding_window=True, sliding_window=16, max_window_layers=3), {"qkv_bias"}),
        (Qwen3Config(**TINY, use_sliding_window=False, sliding_window=16), {"qk_norm"}),
    ],
)
def test_architectures_differ_in_flags(hf, flags):
    config = ModelConfig.from_hf(hf)
    assert {name for name in FLAGS if getattr(config, name)} == flags


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize(
    ("rope_type", "parameters"),
    [
        ("default", {}),
        ("linear", {"factor": 2.0}),
        ("llama3", LLAMA3),
        ("yarn", YARN),
        ("yarn", YARN | {"beta_fast": 16.0}),
    ],
)
def test_the_old_spelling_equals_the_new(rope_type, parameters, type_key):
    old = old_config(rope_scaling={type_key: rope_type, **parameters})
    new = ModelConfig.from_hf(new_config({"rope_type": rope_type, **parameters}))
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(old) == new, "reading changes nothing"
    assert new.rope == RopeConfig(500000.0, rope_type, parameters)
    assert new.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({}, "head_dim", 32 // 4),
        ({"head_dim": None}, "head_dim", 32 // 4),
        ({"head_dim": 24}, "head_dim", 24),
        ({"torch_dtype": "float16"}, "dtype", torch.float16),
        ({"torch_dtype": torch.float16}, "dtype", torch.float16),
        ({"torch_dtype": None}, "dtype", torch.float32),
        ({}, "rope", RopeConfig(500000.0)),
        ({"partial_rotary_factor": 1.0}, "rope", RopeConfig(500000.0)),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope",
            RopeConfig(500000.0, "yarn", {"factor": 4.0, "original_max_position_embeddings": 128}),
        ),
        # The positions, or what scaling makes of them.
        ({}, "max_len", 128),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "max_len", 512),
        ({"rope_scaling": {"type": "yarn", **YARN}, "max_position_embeddings": 64}, "max_len", 256),
        ({"rope_scaling": {"type": "yarn", **YARN}, "max_position_embeddings": 256}, "max_len", 256),
        ({"rope_scaling": {"type": "yarn", **YARN}, "max_position_embeddings": 512}, "max_len", 512),
        ({"rope_scaling": {"type": "yarn", "factor": 2.5}, "max_position_embeddings": 64}, "max_len", 160),
    ],
    ids=str,
)
def test_what_is_not_given_or_given_in_another_way_is_derived(changes, name, value):
    assert getattr(ModelConfig.from_hf(old_config(**changes)), name) == value


WINDOW = {"use_sliding_window": True, "sliding_window": 16}


def scaled(rope_type, **parameters):
    return old_config(rope_scaling={"type": rope_type, **parameters})


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (Qwen3MoeConfig(**TINY), "model_type must be 'qwen3' or 'qwen2' or 'llama', got 'qwen3_moe'"),
        (new_config(architectures=["LlamaForSequenceClassification"]), "'LlamaForSequenceClassification'"),
        (
            new_config(quantization_config={"quant_method": "gptq", "bits": 4}),
            "quantization_config must be None, got .*gptq",
        ),
        (new_config(hidden_act="gelu"), "hidden_act must be 'silu', got 'gelu'"),
        (new_config(dtype="int8"), "dtype must .*torch.int8"),
        (old_config(torch_dtype="float8_e4m3fn"), "dtype must .*float8_e4m3fn"),
        (scaled("dynamic", factor=2.0), "rope_type must .* or 'yarn', got 'dynamic'"),
        (scaled("linear"), r"'linear': missing \['factor'\]"),
        (scaled("llama3", **LLAMA3 | {"low_freq_factor": None}), r"'llama3': missing \['low_freq_factor'\]"),
        (scaled("yarn", factor=2.0, mscale=-1.0), r"mscale of rope scaling must be in \[0\.0, .*got -1\.0"),
        (scaled("linear", factor=2.0, wobble=3), r"'linear': .*not supported \['wobble'\]"),
        (old_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (new_config({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (Qwen2Config(**TINY, **WINDOW, max_window_layers=1), "layer_types must .*, got 'sliding_attention'"),
        (scaled("llama3", **LLAMA3 | {"low_freq_factor": 4.0}), "low_freq_factor must be less than high_freq_factor"),
        (
            Qwen3Config(**TINY, **WINDOW, layer_types=["full_attention", "sliding_attention", "full_attention"]),
            "layer_types must .*, got 'sliding_attention'",
        ),
        (old_config(num_key_value_heads=3), "num_key_value_heads must divide num_attention_heads=4, got 3"),
        (old_config(num_hidden_layers=0), r"num_hidden_layers must be in \[1, 16777216\], got 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(hf, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf)


# ------------------------------------------------------------------------------------------ the checkpoint's folder


def read_folder(folder, config, generation=None):
    """What is read of a folder whose files have this content: a config to save, an object, bytes or nothing."""
    if isinstance(config, LlamaConfig | Qwen2Config | Qwen3Config):
        config.save_pretrained(folder)
        config = None
    for name, content in ("config.json", config), ("generation_config.json", generation):
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return ModelConfig.from_folder(folder, ModelConfig.from_hf)


def test_the_old_spelling_is_read_from_a_folder_too(tmp_path):
    old = vars(old_config(rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16", eos_token_id=2))
    new = new_config({"rope_type": "linear", "factor": 2.0}, eos_token_id=2)
    assert read_folder(tmp_path, old) == ModelConfig.from_hf(new)


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (2, None, {2}),
        ([2, 3], None, {2, 3}),
        (2, {"eos_token_id": 7}, {7}),
        (2, {"eos_token_id": [5, 7]}, {5, 7}),
        (2, {"eos_token_id": None}, {2}),
        (0, {"eos_token_id": 0}, {0}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_eos_tokens_are_the_generation_configs_or_else_the_configs(tmp_path, eos, generation, expected):
    assert read_folder(tmp_path, new_config(eos_token_id=eos), generation).eos_token_ids == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "min_p": None, "max_new_tokens": 7}, {"temperature": 0.6, "max_tokens": 7}),
        ({"do_sample": True, "top_k": 50.0, "top_p": 0.9}, {"top_k": 50, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
    ],
)
def test_sampling_params_are_what_the_generation_config_means(tmp_path, generation, expected):
    config = read_folder(tmp_path, new_config(), generation)
    assert config.default_sampling_params == SamplingParams(**expected)


LLAMA = {**TINY, "model_type": "llama"}
BROKEN = [b"", b"{", b"[]", b"\xff"]
ROPES = [  # with what the error says; transformers has checks of its own, which raise KeyError and more
    ({"rope_type": "longrope", "rope_theta": 1e4}, "longrope"),
    ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
    ({"rope_type": "linear", "factor": "2", "rope_theta": 1e4}, "factor"),
    ({"rope_type": "linear", "factor": 0, "rope_theta": 1e4}, "factor"),
    ({"rope_type": "linear", "factor": -1, "rope_theta": 1e4}, "factor"),
    ({"rope_type": "default", "rope_theta": -5}, "rope_theta"),
]
WRONG_FIELDS = {
    "eos_token_id": ["x", ["263"], [None], 2.5],
    "architectures": [7],
    "rms_norm_eps": [-1.0, NAN],
    "head_dim": [0, 7],
    "max_position_embeddings": [0],
}
WRONG_GENERATION = {
    "eos_token_id": ["x", [2.5]],
    "temperature": ["hot"],
    "top_k": [2.5],
    "top_p": [0],
    "max_new_tokens": [-3],
}


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        (None, None, r"' has no config\.json"),
        ({}, None, "' has no config.json with a model_type"),
        *((content, None, "/config.json' is damaged") for content in BROKEN),
        *((LLAMA, content, "/generation_config.json' is damaged") for content in BROKEN),
        ({"model_type": "no_such_model"}, None, "/config.json'.*no_such_model"),
        ({"model_type": "mistral"}, None, "/config.json'.*model_type must .*got 'mistral'"),
        (
            {**LLAMA, "num_attention_heads": 0},
            None,
            "/config.json': (refused by transformers|num_attention_heads must be at least 1)",
        ),
        *(({**LLAMA, "rope_parameters": rope}, None, f"/config.json'.*{message}") for rope, message in ROPES),
        *(
            ({**LLAMA, name: value}, None, f"/config.json'.*{name}")
            for name, values in WRONG_FIELDS.items()
            for value in values
        ),
        *(
            (LLAMA, {name: value}, f"/generation_config.json'.*{name}")
            for name, values in WRONG_GENERATION.items()
            for value in values
        ),
    ],
)
def test_what_is_wrong_in_a_folder_is_named_with_its_file(tmp_path, config, generation, message):
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(tmp_path))}{message}"):
        read_folder(tmp_path, config, generation)


def test_code_in_a_folder_is_never_run(tmp_path):
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nraise SystemExit\n")
    assert read_folder(tmp_path, new_config(auto_map=auto_map)) == ModelConfig.from_hf(new_config())
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == auto_map
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------------- memory


def pool_gib(total, free, utilization, held, peak):
    total, free, held, peak = (int(size * GIB) for size in (total, free, held, peak))
    return pool_bytes(total, free, utilization, held, peak) / GIB


@pytest.mark.parametrize(
    ("total", "free", "utilization", "held", "peak", "pool"),
    [
        (80, 64, 0.75, 16, 4, 40),  # 80 x 0.75 - 16 - 4
        (80, 64, 1.0, 16, 4, 60),  # exactly what is free
        (80, 80, 0.25, 0, 0, 20),
        # What other processes hold does not make our share smaller, as long as the rest is free.
        *((80, 64 - others, 0.5, 16, 4, 20) for others in (0, 10, 30)),
    ],
)
def test_the_pool_is_our_share_less_what_we_hold_and_a_steps_peak(total, free, utilization, held, peak, pool):
    assert pool_gib(total, free, utilization, held, peak) == pytest.approx(pool)


def test_one_byte_more_than_is_free_is_refused():
    assert pool_bytes(total=1000, free=800, utilization=1.0, held=200, peak=100) == 700
    with pytest.raises(ValueError, match="are free"):
        pool_bytes(total=1000, free=799, utilization=1.0, held=200, peak=100)


@pytest.mark.parametrize(
    ("total", "free", "utilization", "held", "peak", "figures"),
    [
        # A share of 72 GiB less 16 + 4 is 52, but beside the others' 30 GiB only 34 are free, a step's 4 among them.
        (80, 34, 0.9, 16, 4, "would take 52.00 GiB|30.00 GiB are free|other processes hold 30.00 GiB|lower gpu_memory"),
        (20, 12, 0.5, 8, 2, "no memory is left|raise gpu_memory_utilization"),
        (20, 12, 0.5, 9, 2, "no memory is left|raise gpu_memory_utilization"),
    ],
)
def test_a_share_that_leaves_nothing_or_more_than_is_free_is_refused_with_the_figures(
    total, free, utilization, held, peak, figures
):
    with pytest.raises(ValueError, match="GiB") as refused:
        pool_gib(total, free, utilization, held, peak)
    share = f"gpu_memory_utilization={utilization} of {total}.00 GiB is {total * utilization:.2f} GiB"
    held_and_peak = f"this process holds {held}.00 GiB and a step takes {peak}.00 GiB"
    for figure in share, held_and_peak, *figures.split("|"):
        assert figure in str(refused.value)


V2 = ("memory.max", "memory.current")
V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")


@pytest.mark.parametrize("names", [V2, V1], ids=["v2", "v1"])
@pytest.mark.parametrize(
    ("limit", "usage", "available"),
    [
        (600, 200, 400),
        (5000, 200, 1000),  # a limit beyond what the machine has
        (600, 700, 0),  # usage may exceed a limit that was lowered
        ("max", 200, 1000),
        (2**63 - 4096, 200, 1000),  # v1's way to say that there is none
        (10, None, 1000),  # without one of the files, or both, no cgroup says
        (None, 10, 1000),
        (None, None, 1000),
    ],
)
def test_host_memory_is_what_a_cgroup_leaves_of_what_is_available(
    tmp_path, monkeypatch, names, limit, usage, available
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    for name, value in zip(names, (limit, usage), strict=True):
        if value is not None:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"{value}\n")
    assert available_host_memory(tmp_path) == available

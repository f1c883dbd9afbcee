"""Options, the reading of a checkpoint's config, and the arithmetic of the KV pool's memory."""

import json
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import psutil
import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from nanovllm import LLM, SamplingParams
from nanovllm.attention import AttentionBackend
from nanovllm.config import Config, ModelConfig, RopeConfig
from nanovllm.engine.memory import GIB, available_host_memory, pool_bytes
from nanovllm.models.decoder import Decoder

# ---------------------------------------------------------------------------------------------------- options

WRONG_VALUES: dict[str, list[Any]] = {
    "model": [None, 3, ["folder"]],
    "enforce_eager": [1, 0, "yes", None],
    "max_model_len": [0, -1, "4", True, 4096.0, None],
    "max_num_seqs": [0, -1, "4", True, 1.5],
    "max_num_batched_tokens": [0, -1, "4", True, 1e4],
    "gpu_memory_utilization": [0, 0.0, -0.5, 1.5, float("nan"), "x", True, None],
    "tensor_parallel_size": [0, -1, "1", True, 1.5],
    "kvcache_block_size": [0, -16, "16", False, 16.0],
    "num_kvcache_blocks": [0, 1, -2, "9", True, None],
    "device": ["tpu", "cuda:99", "meta", "cuda:x", None, 1.5],
    "dtype": ["int8", "float64", "bf16", None, torch.int8, torch.float64],
    "attention_backend": ["nope", "", None, 1, AttentionBackend],
    "model_class": ["Decoder", 1, [Decoder]],
    "enable_prefix_caching": [1, 0, "on", None],
    "async_scheduling": [1, 0, "on", None],
    "load_format": ["pt", "safetensors", None, True],
    "seed": ["a", 1.0, True, 2**63, -(2**63) - 1],
    "tokenizer": [3, ["folder"], False],
    "revision": [3, b"main", Path("main")],
    "use_tqdm": [1, 0, None],
    "trust_remote_code": [True, 1, 0, "False", None],
    "enable_chunked_prefill": [False, 1, 0, "True", None],
}

ACCEPTED_VALUES: dict[str, list[Any]] = {
    "model": [Path("folder"), "owner/name"],
    "enforce_eager": [True],
    "max_model_len": [1, numpy.int64(7)],
    "max_num_seqs": [1, 2**20],
    "max_num_batched_tokens": [1],
    "gpu_memory_utilization": [1e-3, 1, 1.0, numpy.float32(0.5)],
    "tensor_parallel_size": [1, 2],
    "kvcache_block_size": [1, 256],
    "num_kvcache_blocks": [-1, 2],
    "device": ["auto", "cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)],
    "dtype": ["auto", "bfloat16", "float16", "float32", torch.bfloat16, torch.float16, torch.float32],
    "attention_backend": ["auto", "reference"],
    "model_class": [None, Decoder],
    "enable_prefix_caching": [False],
    "async_scheduling": [False],
    "load_format": ["auto", "dummy"],
    "seed": [None, 0, -1, 2**63 - 1],
    "tokenizer": [None, "owner/name", Path("folder")],
    "revision": [None, "main"],
    "use_tqdm": [False],
    "trust_remote_code": [False],  # vLLM's default: spelling it out is no error
    "enable_chunked_prefill": [True],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


@pytest.mark.parametrize("table", [WRONG_VALUES, ACCEPTED_VALUES])
def test_the_tables_above_cover_every_option(table: dict[str, list[Any]]) -> None:
    assert list(table) == [f.name for f in fields(Config)]


@pytest.mark.parametrize(("name", "value"), cases(WRONG_VALUES))
def test_a_wrong_value_is_refused_with_the_options_name_and_the_value(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        Config(**{"model": "folder", name: value})
    shown = str(value) if isinstance(value, torch.dtype) else repr(value)
    assert str(refused.value).startswith(name)
    assert shown in str(refused.value)


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED_VALUES))
def test_an_allowed_value_is_kept(name: str, value: Any) -> None:
    assert getattr(Config(**{"model": "folder", name: value}), name) == value


@pytest.mark.parametrize(
    ("unknown", "known"),
    [
        ("max_model_length", "max_model_len"),
        ("block_size", "kvcache_block_size"),
        ("kv_cache_block_size", "kvcache_block_size"),
        ("max_seqs", "max_num_seqs"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("backend", "attention_backend"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one(unknown: str, known: str) -> None:
    with pytest.raises(TypeError, match=rf"'{unknown}'; did you mean '{known}'\?$"):
        Config.from_options("folder", {unknown: 1})


def test_an_unknown_option_with_nothing_near_lists_the_known_ones() -> None:
    with pytest.raises(TypeError, match="'zzz'; known are") as refused:
        Config.from_options("folder", {"zzz": 1})
    known = [f.name for f in fields(Config) if f.name != "model"]
    assert str(refused.value).endswith(", ".join(known))


def test_options_are_checked_before_the_model_is_looked_for() -> None:
    with pytest.raises(TypeError, match="max_model_length"):
        LLM("/no/such/folder", max_model_length=64)
    with pytest.raises(ValueError, match="max_num_seqs"):
        LLM("/no/such/folder", max_num_seqs=0)


def test_the_defaults_are_nano_vllms_and_vllms() -> None:
    config = Config.from_options("folder", {})
    assert {f.name: getattr(config, f.name) for f in fields(Config)} == {
        "model": "folder",
        "enforce_eager": False,
        "max_model_len": 4096,
        "max_num_seqs": 512,
        "max_num_batched_tokens": 16384,
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": 1,
        "kvcache_block_size": None,
        "num_kvcache_blocks": -1,
        "device": "auto",
        "dtype": "auto",
        "attention_backend": "auto",
        "model_class": None,
        "enable_prefix_caching": True,
        "async_scheduling": True,
        "load_format": "auto",
        "seed": None,
        "tokenizer": None,
        "revision": None,
        "use_tqdm": True,
        "trust_remote_code": False,
        "enable_chunked_prefill": True,
    }


def test_options_are_frozen() -> None:
    config = Config(model="folder")
    with pytest.raises(FrozenInstanceError):
        config.max_model_len = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("asked", "got"),
    [("auto", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32), (torch.float32, torch.float32)],
)
def test_dtype_auto_is_the_checkpoints_and_any_other_wins_over_it(asked: Any, got: torch.dtype) -> None:
    assert Config(model="folder", dtype=asked).torch_dtype(torch.float16) is got


@pytest.mark.parametrize(("has_cuda", "device"), [(False, "cpu"), (True, "cuda")])
def test_device_auto_is_cuda_if_there_is_a_gpu(monkeypatch: Any, has_cuda: bool, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert Config(model="folder").torch_device == torch.device(device)


@pytest.mark.parametrize(("num_gpus", "device", "is_there"), [(0, "cuda", 0), (1, "cuda:1", 0), (2, "cuda:1", 1)])
def test_a_cuda_device_must_be_there(monkeypatch: Any, num_gpus: int, device: str, is_there: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    if is_there:
        assert Config(model="folder", device=device).torch_device == torch.device(device)
    else:
        gpus = "".join(f" or {gpu!r}" for gpu in (["cuda", "cuda:0"] if num_gpus else []))
        with pytest.raises(ValueError, match=f"^device must be 'auto' or 'cpu' or 'cpu:0'{gpus}, got '{device}'$"):
            Config(model="folder", device=device)


# --------------------------------------------------------------------------------------- the checkpoint's config

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def old_config(**changes: Any) -> SimpleNamespace:
    """A Llama config as transformers 4 spells it: rope_theta beside rope_scaling, torch_dtype."""
    old = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 500000.0}
    return SimpleNamespace(**{**TINY, **old, "rope_scaling": None, "torch_dtype": torch.bfloat16, **changes})


def new_config(rope: dict[str, Any] | None = None, **changes: Any) -> LlamaConfig:
    """The same as transformers 5 spells it: rope_parameters, dtype."""
    rope_parameters = {"rope_type": "default", "rope_theta": 500000.0, **(rope or {})}
    given = {**TINY, "rope_parameters": rope_parameters, "dtype": "bfloat16", "eos_token_id": None, **changes}
    return LlamaConfig(**given)


def test_every_size_is_read() -> None:
    assert ModelConfig.from_hf(
        Qwen3Config(**TINY, head_dim=16, tie_word_embeddings=True, dtype="float16")
    ) == ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        qk_norm=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        dtype=torch.float16,
        eos_token_ids=frozenset(),
    )


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
    ],
    ids=lambda value: "+".join(sorted(value)) or "none" if isinstance(value, set) else value.model_type,
)
def test_architectures_differ_in_flags(hf: Any, flags: set[str]) -> None:
    config = ModelConfig.from_hf(hf)
    every = ("qk_norm", "qkv_bias", "o_bias", "mlp_bias", "tie_word_embeddings")
    assert {name for name in every if getattr(config, name)} == flags


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize(
    ("rope_type", "parameters"),
    [("linear", {"factor": 2.0}), ("llama3", LLAMA3), ("yarn", YARN), ("yarn", {**YARN, "beta_fast": 16.0})],
)
def test_the_old_spelling_equals_the_new(rope_type: str, parameters: dict[str, Any], type_key: str) -> None:
    old = ModelConfig.from_hf(old_config(rope_scaling={type_key: rope_type, **parameters}))
    new = ModelConfig.from_hf(new_config({"rope_type": rope_type, **parameters}))
    assert old == new
    assert new.rope == RopeConfig(500000.0, rope_type, parameters)
    assert new.dtype is torch.bfloat16


def test_rope_without_scaling_is_the_same_in_both_spellings() -> None:
    assert ModelConfig.from_hf(old_config()) == ModelConfig.from_hf(new_config())
    assert ModelConfig.from_hf(old_config()).rope == RopeConfig(500000.0, "default", {})


def test_reading_does_not_change_the_config() -> None:
    hf = old_config(rope_scaling={"type": "linear", "factor": 2.0})
    assert ModelConfig.from_hf(hf) == ModelConfig.from_hf(hf)


def test_yarns_original_length_is_the_models_own_where_none_is_given() -> None:
    config = ModelConfig.from_hf(old_config(rope_scaling={"type": "yarn", "factor": 4.0}))
    assert config.rope.parameters["original_max_position_embeddings"] == 128


@pytest.mark.parametrize("given", [{}, {"head_dim": None}])
def test_head_dim_is_the_share_of_a_head_where_none_is_given(given: dict[str, Any]) -> None:
    assert ModelConfig.from_hf(old_config(**given)).head_dim == 32 // 4
    assert ModelConfig.from_hf(old_config(head_dim=24)).head_dim == 24


@pytest.mark.parametrize(
    ("given", "dtype"), [("float16", torch.float16), (torch.bfloat16, torch.bfloat16), (None, torch.float32)]
)
def test_dtype_is_read_as_a_name_or_as_a_dtype_and_is_float32_where_there_is_none(
    given: Any, dtype: torch.dtype
) -> None:
    assert ModelConfig.from_hf(old_config(torch_dtype=given)).dtype is dtype


SLIDING = {"use_sliding_window": True, "sliding_window": 16}

UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "mistral": (MistralConfig(**TINY), "model_type must be 'qwen3' or 'qwen2' or 'llama', got 'mistral'"),
    "mixture of experts": (Qwen3MoeConfig(**TINY), "model_type must .*, got 'qwen3_moe'"),
    "classifier": (new_config(architectures=["LlamaForSequenceClassification"]), "'LlamaForSequenceClassification'"),
    "quantised": (new_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised .*gptq"),
    "gelu": (new_config(hidden_act="gelu"), "hidden_act must be 'silu', got 'gelu'"),
    "int8": (new_config(dtype="int8"), "dtype must .*torch.int8"),
    "float8": (old_config(torch_dtype="float8_e4m3fn"), "dtype must .*float8_e4m3fn"),
    "dynamic rope": (
        old_config(rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope_type must .* or 'yarn', got 'dynamic'",
    ),
    "longrope": (
        old_config(rope_scaling={"rope_type": "longrope", "factor": 2.0}),
        "rope_type must .* or 'yarn', got 'longrope'",
    ),
    "no factor": (old_config(rope_scaling={"type": "linear"}), r"'linear': missing \['factor'\]"),
    "no low_freq_factor": (
        old_config(rope_scaling={**LLAMA3, "rope_type": "llama3", "low_freq_factor": None}),
        r"'llama3': missing \['low_freq_factor'\]",
    ),
    "unknown rope parameter": (
        old_config(rope_scaling={"type": "linear", "factor": 2.0, "wobble": 3}),
        r"'linear': .*not supported \['wobble'\]",
    ),
    "partial rotary, old": (old_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "partial rotary, new": (new_config({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    "sliding window, qwen2": (Qwen2Config(**TINY, **SLIDING, max_window_layers=1), "sliding-window .*16"),
    "sliding window, old": (  # has no layer_types
        old_config(model_type="qwen2", **SLIDING, max_window_layers=1),
        "sliding-window .*16",
    ),
    "sliding window, qwen3": (Qwen3Config(**TINY, **SLIDING, max_window_layers=2), "sliding-window .*16"),
    "sliding window, by layer": (
        Qwen3Config(**TINY, **SLIDING, layer_types=["full_attention", "sliding_attention", "full_attention"]),
        "sliding-window .*16",
    ),
}


@pytest.mark.parametrize(("hf", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(hf: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize(
    "hf",
    [
        Qwen2Config(**TINY, use_sliding_window=False, sliding_window=16, max_window_layers=1),
        Qwen2Config(**TINY, use_sliding_window=True, sliding_window=16, max_window_layers=3),
        Qwen3Config(**TINY, use_sliding_window=False, sliding_window=16),
    ],
    ids=["off", "no layer uses it", "qwen3"],
)
def test_a_sliding_window_that_no_layer_uses_is_accepted(hf: Any) -> None:
    assert ModelConfig.from_hf(hf).num_hidden_layers == 3


def test_a_partial_rotary_factor_of_one_is_accepted() -> None:
    assert ModelConfig.from_hf(old_config(partial_rotary_factor=1.0)) == ModelConfig.from_hf(old_config())


@pytest.mark.parametrize(
    ("rope_scaling", "max_positions", "max_len"),
    [
        (None, 128, 128),
        ({"type": "linear", "factor": 4.0}, 128, 512),
        ({"type": "yarn", **YARN}, 64, 256),
        ({"type": "yarn", **YARN}, 256, 256),
        ({"type": "yarn", **YARN}, 512, 512),
        ({"type": "yarn", "factor": 2.5}, 64, 160),
    ],
)
def test_max_len_is_the_positions_or_what_scaling_makes_of_them(
    rope_scaling: Any, max_positions: int, max_len: int
) -> None:
    hf = old_config(rope_scaling=rope_scaling, max_position_embeddings=max_positions)
    assert ModelConfig.from_hf(hf).max_len == max_len


# ------------------------------------------------------------------------------------------ the checkpoint's folder


@pytest.mark.parametrize(
    ("eos", "generation_eos", "expected"),
    [
        (2, "no file", {2}),
        ([2, 3], "no file", {2, 3}),
        (2, 7, {7}),
        (2, [5, 7], {5, 7}),
        (2, None, {2}),
        (0, 0, {0}),
        (None, None, set()),
    ],
)
def test_eos_tokens_are_the_generation_configs_or_else_the_configs(
    tmp_path: Path, eos: Any, generation_eos: Any, expected: set[int]
) -> None:
    new_config(eos_token_id=eos).save_pretrained(tmp_path)
    if generation_eos != "no file":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    assert ModelConfig.from_folder(tmp_path, ModelConfig.from_hf).eos_token_ids == expected


@pytest.mark.parametrize(
    "hf", [Qwen3Config(**TINY), Qwen2Config(**TINY), new_config({"rope_type": "llama3", **LLAMA3})]
)
def test_a_folders_config_is_what_was_saved_there(tmp_path: Path, hf: Any) -> None:
    hf.save_pretrained(tmp_path)
    assert ModelConfig.from_folder(tmp_path, ModelConfig.from_hf) == ModelConfig.from_hf(hf)


def test_the_old_spelling_is_read_from_a_folder_too(tmp_path: Path) -> None:
    old = vars(old_config(rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16", eos_token_id=2))
    (tmp_path / "config.json").write_text(json.dumps(old))
    expected = ModelConfig.from_hf(new_config({"rope_type": "linear", "factor": 2.0}, eos_token_id=2))
    assert ModelConfig.from_folder(tmp_path, ModelConfig.from_hf) == expected


def test_a_folder_without_config_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"'{tmp_path}' has no config\.json"):
        ModelConfig.from_folder(tmp_path, ModelConfig.from_hf)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_config_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    new_config().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"'{re.escape(str(tmp_path / name))}' is damaged"):
        ModelConfig.from_folder(tmp_path, ModelConfig.from_hf)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}}, "factor"),
        (
            {"num_attention_heads": 0},
            r"config\.json': (refused by transformers|num_attention_heads must be at least 1)",
        ),
    ],
    ids=["longrope", "no factor", "no heads"],
)
def test_what_transformers_refuses_in_a_folder_is_a_value_error_too(
    tmp_path: Path, wrong: dict[str, Any], name: str
) -> None:
    """It has checks of its own, which raise KeyError and more."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "llama", **wrong}))
    with pytest.raises(ValueError, match=name):
        ModelConfig.from_folder(tmp_path, ModelConfig.from_hf)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"model_type": "mistral"}, "model_type must .*got 'mistral'"),
        ({}, "has no config.json with a model_type"),
    ],
)
def test_a_folder_of_another_model_type_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_folder(tmp_path, ModelConfig.from_hf)


NAN = float("nan")
DAMAGED = {
    "config.json": [
        {"eos_token_id": "x"},
        {"eos_token_id": ["263"]},
        {"eos_token_id": [None]},
        {"eos_token_id": 2.5},
        {"architectures": 7},
        {"rope_parameters": {"rope_type": "linear", "factor": "2", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "factor": -1, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": -5}},
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": NAN},
        {"head_dim": 0},
        {"head_dim": 7},
        {"num_key_value_heads": 3},
        {"max_position_embeddings": 0},
    ],
    "generation_config.json": [
        {"eos_token_id": "x"},
        {"eos_token_id": [2.5]},
        {"temperature": "hot"},
        {"top_k": 2.5},
        {"top_p": 0},
        {"max_new_tokens": -3},
    ],
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, cases in DAMAGED.items() for wrong in cases], ids=str
)
def test_a_damaged_value_is_named_with_its_file(tmp_path: Path, name: str, wrong: dict[str, Any]) -> None:
    new_config().save_pretrained(tmp_path)
    file = tmp_path / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | wrong))
    (field,) = wrong
    field = {"rope_parameters": "factor|rope_theta"}.get(field, field)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(file))}'.*({field})"):
        ModelConfig.from_folder(tmp_path, ModelConfig.from_hf)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "min_p": None, "max_new_tokens": 7}, {"temperature": 0.6, "top_p": 0.9, "max_tokens": 7}),
        ({"do_sample": True, "top_k": 50.0}, {"top_k": 50}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_sampling_params_are_what_the_generation_config_means(
    tmp_path: Path, generation: dict[str, Any], expected: dict[str, Any]
) -> None:
    new_config().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = ModelConfig.from_folder(tmp_path, ModelConfig.from_hf)
    assert config.default_sampling_params == SamplingParams(**expected)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    new_config(auto_map=auto_map).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == auto_map
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nraise SystemExit\n")
    assert ModelConfig.from_folder(tmp_path, ModelConfig.from_hf) == ModelConfig.from_hf(new_config())
    assert not ran.exists()


def test_a_model_config_is_frozen_and_can_be_changed_by_a_copy() -> None:
    config = ModelConfig.from_hf(new_config())
    with pytest.raises(FrozenInstanceError):
        config.dtype = torch.float32  # type: ignore[misc]
    assert replace(config, dtype=torch.float32).dtype is torch.float32


# ------------------------------------------------------------------------------------------------------- memory


def pool_gib(total: float, free: float, utilization: float, held: float, peak: float) -> float:
    sizes = (int(size * GIB) for size in (total, free, held, peak))
    total_bytes, free_bytes, held_bytes, peak_bytes = sizes
    return pool_bytes(total_bytes, free_bytes, utilization, held_bytes, peak_bytes) / GIB


@pytest.mark.parametrize(
    ("total", "free", "utilization", "held", "peak", "pool"),
    [
        (80, 64, 0.75, 16, 4, 40),  # 80 x 0.75 - 16 - 4
        (80, 64, 0.5, 16, 4, 20),
        (80, 64, 1.0, 16, 4, 60),  # exactly what is free
        (80, 80, 0.25, 0, 0, 20),
    ],
)
def test_the_pool_is_our_share_less_what_we_hold_and_a_steps_peak(
    total: float, free: float, utilization: float, held: float, peak: float, pool: float
) -> None:
    assert pool_gib(total, free, utilization, held, peak) == pytest.approx(pool)


@pytest.mark.parametrize("others", [0, 10, 30])
def test_what_other_processes_hold_is_not_part_of_our_share(others: int) -> None:
    """Another process on the card must not make the pool smaller, as long as the rest is free."""
    assert pool_gib(80, 80 - 16 - others, 0.5, held=16, peak=4) == pytest.approx(20)


def test_more_than_is_free_is_refused_with_the_figures() -> None:
    """A share of 72 GiB less 16 + 4 is 52, but beside the others' 30 GiB only 34 are free, a step's 4 among them."""
    with pytest.raises(ValueError, match="lower gpu_memory_utilization") as refused:
        pool_gib(80, 80 - 16 - 30, 0.9, held=16, peak=4)
    for figure in (
        "would take 52.00 GiB",
        "30.00 GiB are free",
        "gpu_memory_utilization=0.9 of 80.00 GiB is 72.00 GiB",
        "this process holds 16.00 GiB",
        "a step takes 4.00 GiB",
        "other processes hold 30.00 GiB",
    ):
        assert figure in str(refused.value)


def test_one_byte_more_than_is_free_is_refused() -> None:
    assert pool_bytes(total=1000, free=800, utilization=1.0, held=200, peak=100) == 700
    with pytest.raises(ValueError, match="are free"):
        pool_bytes(total=1000, free=799, utilization=1.0, held=200, peak=100)


@pytest.mark.parametrize("held", [8, 9])
def test_a_share_that_leaves_nothing_is_refused_with_the_figures(held: int) -> None:
    with pytest.raises(ValueError, match=r"no memory is left .*raise gpu_memory_utilization") as refused:
        pool_gib(20, 12, 0.5, held=held, peak=2)
    assert f"holds {held}.00 GiB and a step takes 2.00 GiB" in str(refused.value)
    assert "gpu_memory_utilization=0.5 of 20.00 GiB is 10.00 GiB" in str(refused.value)


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
    ],
)
def test_host_memory_is_what_a_cgroup_leaves_of_what_is_available(
    tmp_path: Path, monkeypatch: Any, names: tuple[str, str], limit: Any, usage: int, available: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    for name, value in zip(names, (limit, usage), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    assert available_host_memory(tmp_path) == available


@pytest.mark.parametrize("files", [(), V2[:1], V1[1:]])
def test_host_memory_is_what_the_machine_has_where_no_cgroup_says(
    tmp_path: Path, monkeypatch: Any, files: tuple[str, ...]
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("10\n")
    assert available_host_memory(tmp_path) == 1000


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 3}, {"num_hidden_layers": 0}, {"vocab_size": 0}])
def test_sizes_that_make_no_model_are_refused(changes: dict[str, int]) -> None:
    config = LlamaConfig(num_attention_heads=4)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=str(*changes.values())):
        ModelConfig.from_hf(config)


def test_an_empty_model_name_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be a folder"):
        Config(model="")

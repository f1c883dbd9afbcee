"""Config: the user's knobs, validated and frozen. ModelConfig: the architecture, read from a checkpoint's config.

`ModelConfig.from_hf` is the only reader of Hugging Face attributes; what this engine does not run is refused here.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from nanovllm.checks import check_choice, check_fields, check_float, check_int, check_list, check_positive, check_type
from nanovllm.sampling_params import SamplingParams

DTYPES: dict[Any, torch.dtype] = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
DTYPES |= {dtype: dtype for dtype in DTYPES.values()} | {"half": torch.float16, "float": torch.float32}  # vLLM's names
DTYPE_CHOICES = ("auto", *DTYPES)


def check_backend(name: str, value: Any) -> Any:
    """The name of one, or an object of one's own that can attend."""
    is_own = callable(getattr(value, "attend", None)) and not isinstance(value, type)
    return value if is_own else check_choice(name, value, ("auto", "reference", "triton", "flash-attn"))


def check_device(name: str, value: Any) -> Any:
    """The CPU, or a CUDA device that is there."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    check_choice(name, str(value), ("auto", "cpu", "cpu:0", *(["cuda", *gpus] if gpus else [])))
    return value


def check_token_ids(name: str, ids: Any) -> frozenset[int]:
    """The token ids in an `eos_token_id`: None, one or a list; -1 stands for none."""
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return frozenset(check_list(name, ids, check_int, -1))


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of `LLM(model, ...)`, nano-vllm's and vLLM's names.

    Args:
        model: a folder with safetensors, or the id of a Hub repository.
        enforce_eager: no compilation and no CUDA graphs.
        max_model_len: prompt and completion together have at most so many tokens; lowered to the model's own limit, which
            `LLM(max_model_len=None)` takes.
        max_num_seqs: so many sequences run at once.
        max_num_batched_tokens: a step computes at most so many tokens; longer prompts are cut into chunks.
        gpu_memory_utilization: the share of the GPU's whole memory that this process may use.
        tensor_parallel_size: cut the model between so many GPUs (processes, on the CPU).
        kvcache_block_size: tokens in a KV block; None is what the attention backend likes best.
        num_kvcache_blocks: blocks in the pool, one of which is never handed out; -1 takes what memory allows.
        device: "auto" (CUDA if there is a GPU), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's), "bfloat16", "float16" or "half", "float32" or "float".
        attention_backend: "reference" (plain PyTorch), "triton", "flash-attn", or "auto": the fastest that is there; or an
            `nanovllm.attention.AttentionBackend` of one's own.
        model_class: a `nanovllm.models.decoder.Decoder` of one's own; None is that one.
        enable_prefix_caching: share the KV of equal prefixes between requests.
        async_scheduling: plan and launch steps before the tokens of those before have been read.
        load_format: "auto" (safetensors) or "dummy" (random weights in the shape that config.json says).
        seed: makes the seeds of requests that have none repeatable; None draws fresh ones.
        tokenizer: another folder or Hub id for the tokenizer.
        revision: branch, tag or commit of a Hub repository.
        use_tqdm: show a bar while the weights are loaded.
        trust_remote_code: a permission that is never used: code from a checkpoint is never run.
    """

    model: str | PathLike
    enforce_eager: bool = False
    max_model_len: Annotated[int, check_int, 1] = 4096
    max_num_seqs: Annotated[int, check_int, 1] = 512
    max_num_batched_tokens: Annotated[int, check_int, 1] = 16384
    gpu_memory_utilization: Annotated[float, check_positive, 1.0] = 0.9
    tensor_parallel_size: Annotated[int, check_int, 1] = 1
    kvcache_block_size: Annotated[int | None, check_int, 1] = None
    num_kvcache_blocks: Annotated[int, check_int, -1] = -1
    device: Annotated[str | torch.device, check_device] = "auto"
    dtype: Annotated[str | torch.dtype, check_choice, DTYPE_CHOICES] = "auto"
    attention_backend: Annotated[Any, check_backend] = "auto"
    model_class: Annotated[type | None, check_type, type] = None
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    load_format: Annotated[str, check_choice, ("auto", "dummy")] = "auto"
    seed: Annotated[int | None, check_int, -(2**63), 2**63 - 1] = None
    tokenizer: Annotated[str | PathLike | None, check_type, str | PathLike] = None
    revision: Annotated[str | None, check_type, str] = None
    use_tqdm: bool = True
    trust_remote_code: bool = False

    @classmethod
    def from_options(cls, model: str | PathLike[str], options: dict[str, Any]) -> "Config":
        """Build from keyword arguments, vLLM's too; an unknown one is a TypeError that names the nearest known one."""
        known = [f.name for f in fields(cls) if f.name != "model"]
        if not options.keys() <= set(known) or None in options.values():
            from nanovllm.extras.vllm_options import translate

            options = translate(options)
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                raise TypeError(f"LLM() got an unknown option {name!r}{hint}")
        return cls(model=model, **options)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_kvcache_blocks in (0, 1):
            raise ValueError(f"num_kvcache_blocks must be -1 or at least 2, got {self.num_kvcache_blocks}")
        if self.tensor_parallel_size > 1:
            check_choice("device of several ranks", str(self.device), ("auto", "cpu", "cuda"))
            if self.torch_device.type == "cuda" and not dist.is_torchelastic_launched():
                check_int("tensor_parallel_size on these GPUs", self.tensor_parallel_size, 1, torch.cuda.device_count())

    def device_of(self, local_rank: int) -> torch.device:
        """The device of a rank, `local_rank` being its number on its machine. A GPU has its index: the
        current device may change later, and differs between threads."""
        device = self.torch_device
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", local_rank if self.tensor_parallel_size > 1 else torch.cuda.current_device())
        return device

    @property
    def torch_device(self) -> torch.device:
        available = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(available if self.device == "auto" else self.device)

    def torch_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        return checkpoint if self.dtype == "auto" else DTYPES[self.dtype]


MAX_SIZE, MAX_HEADS = 2**24, 2**16  # no model's; beyond them PyTorch cannot count a matrix's bytes
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}

ROPE_PARAMETERS = {  # rope type: parameters it must have, and ones it may have
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base, and how its frequencies are scaled (one of `ROPE_PARAMETERS`)."""

    theta: float = 10000.0
    type: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, hf: Any) -> "RopeConfig":
        """Read either spelling: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
        scaling = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
        check_type("rope_parameters", scaling, Mapping)
        beside = {name: getattr(hf, name, None) for name in ("rope_theta", "partial_rotary_factor")}
        given = {name: value for name, value in [*beside.items(), *scaling.items()] if value is not None}
        rope_type = given.pop("rope_type", given.pop("type", "default"))
        theta = check_positive("rope_theta", given.pop("rope_theta", cls.theta))
        check_choice("partial_rotary_factor", given.pop("partial_rotary_factor", 1.0), (1.0,))
        required, optional = ROPE_PARAMETERS[check_choice("rope_type", rope_type, ROPE_PARAMETERS)]
        if rope_type == "default":
            return cls(theta)
        if "original_max_position_embeddings" in required:
            given.setdefault("original_max_position_embeddings", hf.max_position_embeddings)
        missing = [name for name in required if name not in given]
        unknown = [name for name in given if name not in required + optional]
        if missing or unknown:
            raise ValueError(f"rope scaling {rope_type!r}: missing {missing}, not supported {unknown}")
        for name, value in given.items():
            if name == "truncate":
                check_type(name, value, bool)
            elif name.startswith("mscale"):
                given[name] = check_float(f"{name} of rope scaling", value, 0.0)
            else:
                given[name] = check_positive(f"{name} of rope scaling", value)
        if rope_type == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
            raise ValueError(f"low_freq_factor must be less than high_freq_factor, got {given}")
        return cls(theta, rope_type, given)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder architecture by flags: Qwen3, Qwen2 and Llama differ in biases and in q/k-norm."""

    vocab_size: Annotated[int, check_int, 1, MAX_SIZE]
    hidden_size: Annotated[int, check_int, 1, MAX_SIZE]
    intermediate_size: Annotated[int, check_int, 1, MAX_SIZE]
    num_hidden_layers: Annotated[int, check_int, 1, MAX_SIZE]
    num_attention_heads: Annotated[int, check_int, 1, MAX_HEADS]
    num_key_value_heads: Annotated[int, check_int, 1, MAX_HEADS]
    head_dim: Annotated[int, check_int, 1, MAX_HEADS]
    rms_norm_eps: Annotated[float, check_float, 0.0]
    rope: RopeConfig
    max_position_embeddings: Annotated[int, check_int, 1]
    tie_word_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: torch.dtype
    eos_token_ids: Annotated[frozenset[int], check_type, frozenset]
    # What generation_config.json recommends.
    default_sampling_params: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads={self.num_attention_heads}, "
                f"got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")

    def check_ranks(self, size: int) -> None:
        """Raise unless the model can be cut between so many ranks, with one or more whole heads to each."""
        heads, kv_heads, intermediate = self.num_attention_heads, self.num_key_value_heads, self.intermediate_size
        if heads % size or intermediate % size or (kv_heads % size and size % kv_heads):
            raise ValueError(
                "tensor_parallel_size must divide the model's heads and intermediate size, and divide its key-value heads "
                f"or be a multiple of them, got {size} for {heads} attention heads, {kv_heads} key-value heads and "
                f"intermediate size {intermediate}"
            )

    @classmethod
    def from_hf(cls, hf: Any) -> "ModelConfig":
        """Read a transformers config, new or old spelling.

        Raises:
            ValueError: for an architecture or a feature that this engine does not run, by name.
        """
        check_choice("model_type", hf.model_type, ARCHITECTURES)
        for architecture in check_list("architectures", getattr(hf, "architectures", None) or (), check_type, str):
            check_choice("architectures", architecture, ARCHITECTURES.values())
        for layer_type in getattr(hf, "layer_types", None) or ():
            check_choice("layer_types", layer_type, ("full_attention",))
        check_choice("quantization_config", getattr(hf, "quantization_config", None), (None,))
        check_choice("hidden_act", hf.hidden_act, ("silu",))
        attention_bias = getattr(hf, "attention_bias", False)
        dtype: Any = getattr(hf, "dtype", None) or getattr(hf, "torch_dtype", None) or torch.float32
        num_heads = check_int("num_attention_heads", hf.num_attention_heads, 1)
        read: dict[str, Any] = {"head_dim": hf.hidden_size // num_heads, "mlp_bias": False}
        read |= {f.name: getattr(hf, f.name) for f in fields(cls) if getattr(hf, f.name, None) is not None}
        read |= {
            "rope": RopeConfig.from_hf(hf),
            "qk_norm": hf.model_type == "qwen3",
            "qkv_bias": hf.model_type == "qwen2" or attention_bias,
            "o_bias": hf.model_type != "qwen2" and attention_bias,
            "dtype": DTYPES[check_choice("dtype", dtype, DTYPES)],
            "eos_token_ids": check_token_ids("eos_token_id", getattr(hf, "eos_token_id", None)),
        }
        return cls(**read)

    @classmethod
    def from_folder(cls, folder: Path, read: Callable[[Any], "ModelConfig"]) -> "ModelConfig":
        """Have `config.json` read, and read `generation_config.json`, whose end-of-sequence tokens win.

        Raises:
            ValueError: with the file, and the field of it that is wrong.
        """
        file = folder / "config.json"
        if "model_type" not in read_json(file):
            raise ValueError(f"model folder {str(folder)!r} has no config.json with a model_type")
        with naming(file):
            try:
                hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            except Exception as error:  # transformers checks values too, and raises what it likes
                raise ValueError(f"refused by transformers: {' '.join(str(error).split())}") from error
            config = read(hf)
        file = folder / "generation_config.json"
        generation = read_json(file)
        with naming(file):
            eos_token_ids = check_token_ids("eos_token_id", generation.get("eos_token_id"))
            return replace(
                config,
                eos_token_ids=eos_token_ids or config.eos_token_ids,
                default_sampling_params=read_sampling_params(generation),
            )

    @property
    def max_len(self) -> int:
        """The longest sequence that the positions are made for."""
        given, num_positions = self.rope.parameters, self.max_position_embeddings
        if self.rope.type == "linear":
            return int(num_positions * given["factor"])
        scaled = given["factor"] * given["original_max_position_embeddings"] if self.rope.type == "yarn" else 0
        return max(num_positions, int(scaled))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, an empty one where there is no file; ValueError with its name if it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return check_type("its content", content, dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors about what a file says are ValueErrors that name it."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{str(file)!r}: {error}") from error


def read_sampling_params(generation: Mapping[str, Any]) -> SamplingParams:
    """What a generation config recommends: greedy where it says that nothing is sampled."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    for name in given.keys() & {"top_k", "max_new_tokens"}:
        if isinstance(given[name], float) and given[name].is_integer():
            given[name] = int(given[name])  # some files say 50.0
    if "max_new_tokens" in given:
        given["max_tokens"] = check_int("max_new_tokens", given.pop("max_new_tokens"), 1)
    if generation.get("do_sample") is False:
        given["temperature"] = 0.0
    return SamplingParams(**given)

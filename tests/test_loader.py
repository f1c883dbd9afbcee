"""The loader: where a checkpoint comes from, what is read of it, and what is refused by name."""

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from nanovllm import LLM, SamplingParams
from nanovllm.attention.reference import ReferenceAttention
from nanovllm.config import ModelConfig
from nanovllm.layers.linear import ColumnParallelLinear, Linear
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import Tensors, fit_config, load_dummy, load_weights, read_headers, resolve_model
from nanovllm.parallel.group import Group, Share

WEIGHTS = "model.safetensors"
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
CHECKPOINTS = {
    "qwen3": Qwen3Config(**TINY),
    "qwen3-tied": Qwen3Config(**TINY, tie_word_embeddings=True),
    "qwen3-biased": Qwen3Config(**TINY, attention_bias=True),
    "qwen2": Qwen2Config(**TINY),
    "llama": LlamaConfig(**TINY),
    "llama-biased": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama-float16": LlamaConfig(**TINY, dtype="float16"),
}
UNTIED, TIED = "qwen3", "qwen3-tied"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
PROMPT = [1, 2, 3]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Callable[[str], Path]:
    """A folder with one of `CHECKPOINTS`, saved by transformers. Every value is random: no ones, no zeros."""
    folders: dict[str, Path] = {}

    def save(name: str, **options: Any) -> Path:
        key = name + str(options)
        if key not in folders:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CHECKPOINTS[name])
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()
            folders[key] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[key], **options)
        return folders[key]

    return save


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """An untied checkpoint that a test may damage."""
    return shutil.copytree(saved(UNTIED), tmp_path / "model")


@pytest.fixture
def opened() -> Iterator[set[str]]:
    """The names of the files that Python opens during the test."""
    names: set[str] = set()
    is_on = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if is_on and event == "open" and isinstance(args[0], str | Path):
            names.add(Path(args[0]).name)

    sys.addaudithook(hook)  # cannot be taken out again, hence is_on
    yield names
    is_on = False


def new_decoder(folder: Path, tensors: Tensors | None = None, **changes: Any) -> Decoder:
    """A decoder for the checkpoint, all NaN: what is not filled shows."""
    config = replace(ModelConfig.from_folder(folder, ModelConfig.from_hf), **changes)
    config = config if tensors is None else fit_config(config, tensors)
    decoder = Decoder(config, ReferenceAttention(), Group(), max_len=64)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(float("nan"))
    return decoder


def load(folder: Path, **changes: Any) -> Decoder:
    tensors = read_headers(folder)
    decoder = new_decoder(folder, tensors, **changes)
    with torch.inference_mode():
        load_weights(decoder, tensors, show_progress=False)
    return decoder


def new_llm(folder: Path | str, **options: Any) -> LLM:
    return LLM(folder, **{"use_tqdm": False, "device": "cpu", "max_model_len": 64, "max_num_seqs": 4, **options})


def complete(llm: LLM) -> list[int]:
    return llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Let `change` change the tensors of a checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def expected_parameters(decoder: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder's parameters must be, given the tensors of the checkpoint."""
    merged = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    expected = {}
    for name, _ in decoder.named_parameters():
        whole = next((whole for whole in merged if whole in name), "")
        parts = [name.replace(whole, part) for part in merged[whole]] if whole else [name]
        found = [tensors[part if part == "lm_head.weight" else f"model.{part}"] for part in parts]
        expected[name] = torch.cat(found)
    return expected


def assert_same_parameters(decoder: nn.Module, expected: dict[str, Tensor]) -> None:
    parameters = dict(decoder.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.data, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------ what is filled


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_parameter_is_filled_with_the_checkpoints_values(saved: Any, name: str) -> None:
    tensors = load_file(saved(name) / WEIGHTS)
    decoder = load(saved(name))
    assert_same_parameters(decoder, expected_parameters(decoder, tensors))
    num_values = sum(tensor.numel() for tensor in tensors.values())
    assert sum(parameter.numel() for parameter in decoder.parameters()) == num_values


def test_llm_completes_with_the_checkpoints_weights(saved: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(UNTIED))
    tokens = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=4, eos_token_id=-1, pad_token_id=0)
    assert complete(new_llm(saved(UNTIED))) == tokens[0, len(PROMPT) :].tolist()


def test_a_tied_head_is_the_embedding_itself(saved: Any) -> None:
    decoder = load(saved(TIED))
    assert decoder.lm_head.weight is decoder.embed_tokens.weight


def test_old_tables_of_frequencies_in_the_checkpoint_are_skipped(saved: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(saved(TIED), tmp_path / "model")
    expected = expected_parameters(new_decoder(folder), load_file(folder / WEIGHTS))
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "model.rotary_emb.inv_freq": torch.zeros(4)}
    edit(folder, lambda tensors: tensors.update(more))
    assert_same_parameters(load(folder), expected)


@pytest.mark.parametrize("head", ["equal", "different", "alone"])
def test_a_head_beside_a_tied_embedding_is_used_as_transformers_does(
    saved: Any, tmp_path: Path, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(saved(TIED), tmp_path / "model")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if head == "different":
            tensors["lm_head.weight"][-1, -1] += 1  # of the last piece that is compared
        if head == "alone":
            del tensors["model.embed_tokens.weight"]

    edit(folder, change)
    decoder = load(folder)
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == (head != "different")
    assert ("lm_head.weight is used" in caplog.text) == (head == "different")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(decoder.lm_head.weight, model.lm_head.weight.data)
    torch.testing.assert_close(decoder.embed_tokens.weight, model.model.embed_tokens.weight.data)


def test_a_sharded_checkpoint_is_the_same_model(saved: Any) -> None:
    shards = saved(UNTIED, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert_same_parameters(load(shards), dict(load(saved(UNTIED)).named_parameters()))


@pytest.mark.parametrize("other", ["consolidated", "adapter_model", "optimizer"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "an index"])
def test_other_safetensors_are_not_read(saved: Any, tmp_path: Path, options: dict[str, Any], other: str) -> None:
    folder = shutil.copytree(saved(UNTIED, **options), tmp_path / "model")
    save_file({"lora_A.weight": torch.ones(3)}, folder / f"{other}.safetensors")
    assert_same_parameters(load(folder), dict(load(saved(UNTIED)).named_parameters()))


def test_one_file_wins_over_an_index_with_a_warning(folder: Path, saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The index of an older model, whose shards may be gone."""
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_parameters(load(folder), dict(load(saved(UNTIED)).named_parameters()))
    assert "model.safetensors.index.json, which is beside it, is not read" in caplog.text


def test_shards_without_an_index_are_all_read(saved: Any, tmp_path: Path) -> None:
    shards = shutil.copytree(saved(UNTIED, max_shard_size="20KB"), tmp_path / "model")
    (shards / "model.safetensors.index.json").unlink()
    assert_same_parameters(load(shards), dict(load(saved(UNTIED)).named_parameters()))


def test_an_index_may_name_links_but_no_file_elsewhere(saved: Any, tmp_path: Path) -> None:
    """The Hub's cache is made of links."""
    shards = shutil.copytree(saved(UNTIED, max_shard_size="20KB"), tmp_path / "model")
    file = max(shards.glob("*.safetensors"))
    file.rename(tmp_path / "blob.safetensors")
    file.symlink_to(tmp_path / "blob.safetensors")
    assert_same_parameters(load(shards), dict(load(saved(UNTIED)).named_parameters()))
    index = shards / "model.safetensors.index.json"
    text = index.read_text()
    for elsewhere in "../blob.safetensors", str(tmp_path / "blob.safetensors"):
        index.write_text(text.replace(file.name, elsewhere))
        with pytest.raises(ValueError, match=f"index.json' is damaged.*{re.escape(elsewhere)}"):
            load(shards)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10**7}, {"head_dim": 10**9}, {"vocab_size": 10**9}, {"hidden_size": 2**40}],
    ids=str,
)
def test_a_size_that_no_tensor_has_is_refused_before_anything_is_built(folder: Path, change: dict[str, int]) -> None:
    """It would take minutes, and then all memory."""
    (field,) = change
    config = json.loads((folder / "config.json").read_text()) | change
    config.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{field} of a checkpoint of 25 tensors must be"):
        new_llm(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_checkpoint_is_rounded_to_the_dtype_that_is_asked_for(saved: Any, dtype: torch.dtype) -> None:
    rounded = {name: tensor.to(dtype) for name, tensor in load_file(saved(UNTIED) / WEIGHTS).items()}
    assert {tensor.dtype for tensor in load_file(saved(UNTIED) / WEIGHTS).values()} == {torch.float32}
    decoder = load(saved(UNTIED), dtype=dtype)
    assert_same_parameters(decoder, expected_parameters(decoder, rounded))


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        (UNTIED, "auto", torch.float32),
        (UNTIED, "bfloat16", torch.bfloat16),
        ("llama-float16", "auto", torch.float16),
        ("llama-float16", "float32", torch.float32),
    ],
)
def test_weights_and_kv_cache_have_the_checkpoints_dtype_or_the_one_that_is_asked_for(
    saved: Any, name: str, dtype: str, expected: torch.dtype
) -> None:
    llm = new_llm(saved(name), dtype=dtype)
    runner = llm.engine.runner
    assert runner is not None
    assert {parameter.dtype for parameter in runner.model.parameters()} == {expected}
    assert {tensor.dtype for cache in runner.kv_cache for tensor in (cache.k, cache.v)} == {expected}


# ------------------------------------------------------------------------------------------------ what is refused


def replace_with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(Q_PROJ), "missing layers.1.self_attn.q_proj.weight, unexpected nothing"),
    "missing norm": (lambda t: t.pop(NORM), "missing layers.0.input_layernorm.weight, unexpected nothing"),
    "missing head": (lambda t: t.pop("lm_head.weight"), "missing lm_head.weight, unexpected nothing"),
    "unexpected": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
        "missing nothing, unexpected model.layers.2.mlp.up_proj.weight",
    ),
    "unexpected bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        "missing nothing, unexpected model.layers.0.self_attn.q_proj.bias",
    ),
    "renamed": (
        rename(NORM, "model.layers.0.ln_1.weight"),
        "missing layers.0.input_layernorm.weight, unexpected model.layers.0.ln_1.weight",
    ),
    "transposed": (
        replace_with("lm_head.weight", lambda w: w.T.contiguous()),
        f"{WEIGHTS}: lm_head.weight is F32 [32, 64], expected a float [64, 32]",
    ),
    "a norm of one value": (  # would broadcast
        replace_with(NORM, lambda w: w[:1].clone()),
        f"{WEIGHTS}: {NORM} is F32 [1], expected a float [32]",
    ),
    "too many heads": (
        replace_with(Q_PROJ, lambda w: w.repeat(2, 1)),
        f"{WEIGHTS}: {Q_PROJ} is F32 [64, 32], expected a float [32, 32]",
    ),
    "int8": (
        replace_with(Q_PROJ, lambda w: w.to(torch.int8)),
        f"{WEIGHTS}: {Q_PROJ} is I8 [32, 32], expected a float [32, 32]",
    ),
    "int32": (
        replace_with(Q_PROJ, lambda w: w.to(torch.int32)),
        f"{WEIGHTS}: {Q_PROJ} is I32 [32, 32], expected a float [32, 32]",
    ),
    "float8": (
        replace_with(Q_PROJ, lambda w: w.to(torch.float8_e4m3fn)),
        f"{WEIGHTS}: {Q_PROJ} is F8_E4M3 [32, 32], expected a float [32, 32]",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_tensor_that_does_not_fit_is_named(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)


def test_of_many_missing_tensors_some_are_named_and_the_rest_counted(folder: Path) -> None:
    num_tensors = len(load_file(folder / WEIGHTS))
    edit(
        folder,
        lambda tensors: [
            tensors.pop(name) for name in list(tensors) if "up_proj" not in name and "lm_head" not in name
        ],
    )
    with pytest.raises(
        ValueError, match=rf"missing embed_tokens.weight, .* and {num_tensors - 3 - 8} more, unexpected"
    ):
        load(folder)


def test_a_tensor_that_is_there_twice_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({NORM.removeprefix("model."): torch.ones(32)}))
    with pytest.raises(ValueError, match=f"has {re.escape(NORM)} twice, in {WEIGHTS}"):
        load(folder)


def test_a_missing_shard_is_named_before_anything_is_read(saved: Any, tmp_path: Path) -> None:
    shards = shutil.copytree(saved(UNTIED, max_shard_size="20KB"), tmp_path / "model")
    last = max(shards.glob("*.safetensors"))
    last.unlink()
    with pytest.raises(ValueError, match=rf"lacks {last.name}, which model.safetensors.index.json names"):
        read_headers(shards)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1], ids=["empty", "in the length", "in the header", "at the end"])
def test_a_truncated_file_is_named(folder: Path, num_bytes: int) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=f"'{re.escape(str(file))}' is damaged or truncated"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        *(
            f'{{"weight_map": {m}}}'
            for m in ("{}", "[]", "null", '{"a": 7}', '{"a": null, "b": "c"}', '{"a": ["x"]}', '{"a": ""}')
        ),
    ],
)
def test_a_damaged_index_is_named(folder: Path, content: str) -> None:
    (folder / WEIGHTS).unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=f"'{re.escape(str(index))}' is damaged"):
        load(folder)


def test_an_empty_folder_has_no_config_and_one_with_a_config_alone_no_weights(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=f"'{re.escape(str(empty))}' has no config.json"):
        new_llm(empty)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"'{re.escape(str(folder))}' has no safetensors: no weights"):
        new_llm(folder)


# -------------------------------------------------------------------------------------------------------- pickles


class Payload:
    """Unpickling it raises SystemExit."""

    def __reduce__(self) -> Any:
        return sys.exit, ("a pickle was loaded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickled_checkpoint_is_refused_and_never_opened(folder: Path, opened: set[str], name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Payload()))
    opened.clear()
    with pytest.raises(ValueError, match=f"no safetensors: only {name}, and pickles are never loaded"):
        new_llm(folder)
    assert "config.json" in opened
    assert name not in opened


def test_a_pickle_beside_safetensors_is_never_opened(folder: Path, opened: set[str]) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    opened.clear()
    assert len(complete(new_llm(folder))) == GREEDY.max_tokens
    assert "config.json" in opened
    assert "pytorch_model.bin" not in opened


# ------------------------------------------------------------------------------------------ where a model comes from


def no_download(*args: Any, **options: Any) -> str:
    raise AssertionError(f"asked the Hub for {args}")


@pytest.fixture
def hub(monkeypatch: Any) -> Callable[[Callable[..., Any]], None]:
    """Puts a function in the place of the Hub's download."""
    return lambda download: monkeypatch.setattr("nanovllm.models.loader.snapshot_download", download)


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_folder_is_used_as_it_is(saved: Any, hub: Any, as_type: type) -> None:
    hub(no_download)
    assert resolve_model(as_type(saved(UNTIED))) == saved(UNTIED)


def test_a_folder_wins_over_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: Any, hub: Any) -> None:
    hub(no_download)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == tmp_path / "owner" / "name"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: Any, hub: Any) -> None:
    hub(no_download)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./model", "../model", "~/no/such/folder", "model", "a/b/c", "a/b c", "https://a/b"]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_named_and_the_hub_is_not_asked(hub: Any, model: str) -> None:
    hub(no_download)
    with pytest.raises(ValueError, match=f"model '{re.escape(model)}' is neither a folder nor a Hub id"):
        new_llm(model)


def test_a_file_is_not_a_folder(saved: Any, hub: Any) -> None:
    hub(no_download)
    with pytest.raises(ValueError, match=r"^model .* is neither a folder nor a Hub id"):
        resolve_model(saved(UNTIED) / WEIGHTS)


def test_of_a_hub_repository_weights_configs_and_tokenizer_are_fetched_and_nothing_else(
    hub: Any, tmp_path: Path
) -> None:
    calls = []
    hub(lambda *args, **options: calls.append((args, options)) or str(tmp_path))
    assert resolve_model("owner/na.me-1", revision="v2") == tmp_path
    ((args, options),) = calls
    assert args == ("owner/na.me-1",)
    assert options["revision"] == "v2"
    wanted = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    ]
    unwanted = [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "model.pt",
        "model.pth",
        "model.gguf",
        "model.onnx",
        "modeling_llama.py",
        "README.md",
        "original/model.safetensors",
        "original/params.json",
        "onnx/config.json",
        "a/b/tokenizer.json",
    ]
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + unwanted, **patterns)) == wanted


def test_the_revision_option_reaches_the_hub_and_the_fetched_folder_is_loaded(saved: Any, hub: Any) -> None:
    revisions = []
    hub(lambda *_, revision, **__: revisions.append(revision) or str(saved(UNTIED)))
    assert complete(new_llm("owner/name", revision="abc")) == complete(new_llm(saved(UNTIED)))
    assert revisions == ["abc"]


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("no network"), RuntimeError("no network")])
def test_a_failed_download_is_a_value_error_that_names_the_id_and_the_reason(hub: Any, error: Exception) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    hub(download)
    with pytest.raises(ValueError, match=r"'owner/name' .*cannot be fetched from the Hub: no network") as refused:
        new_llm("owner/name")
    assert refused.value.__cause__ is error


def test_ctrl_c_during_a_download_is_no_value_error(hub: Any) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    hub(download)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("owner/name")


# ---------------------------------------------------------------------------------------------------- dummy weights


def test_dummy_weights_need_a_config_alone_and_are_repeatable(saved: Any, tmp_path: Path) -> None:
    shutil.copy(saved(UNTIED) / "config.json", tmp_path)
    first, second = (new_llm(tmp_path, load_format="dummy") for _ in range(2))
    assert complete(first) == complete(second)
    first_decoder, second_decoder = new_decoder(tmp_path), new_decoder(tmp_path)
    with torch.inference_mode():
        load_dummy(first_decoder)
        torch.rand(3)  # the global generator has no part in it
        load_dummy(second_decoder)
    assert_same_parameters(second_decoder, dict(first_decoder.named_parameters()))


def test_dummy_norms_are_ones_and_all_else_is_small_and_different(saved: Any) -> None:
    decoder = new_decoder(saved("llama-biased"))
    with torch.inference_mode():
        load_dummy(decoder)
    firsts = set()
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert 0 < parameter.abs().max() < 0.2
            assert 0.01 < parameter.std() < 0.03
            firsts.add(parameter.flatten()[0].item())
    assert len(firsts) == sum("norm" not in name for name, _ in decoder.named_parameters())


def test_dummy_weights_take_the_place_of_those_that_are_there(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"damaged")
    assert len(complete(new_llm(folder, load_format="dummy"))) == GREEDY.max_tokens


# ---------------------------------------------------------------------------------------------------- loading bar


def test_loading_prints_nothing_without_use_tqdm(saved: Any, capfd: Any) -> None:
    new_llm(saved(UNTIED), use_tqdm=False)
    assert capfd.readouterr() == ("", "")


def test_loading_shows_a_bar_on_stderr_that_ends_with_all_tensors(saved: Any, capfd: Any) -> None:
    new_llm(saved(UNTIED), use_tqdm=True)
    out, err = capfd.readouterr()
    num_tensors = len(load_file(saved(UNTIED) / WEIGHTS))
    assert out == ""
    assert "Loading weights" in err
    assert f"{num_tensors}/{num_tensors}" in err


# ------------------------------------------------------------------------------------------- packing on the CPU

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def new_linear(bias: bool, merged: bool, dtype: torch.dtype) -> Linear:
    linear = (
        ColumnParallelLinear(32, {"a": Share(0, 16, 16), "b": Share(0, 8, 8), "c": Share(0, 8, 8)}, bias, dtype)
        if merged
        else Linear(32, 32, bias, dtype)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_()
    return linear


@needs_onednn
@pytest.mark.parametrize("num_rows", [1, 5, 16, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("merged", [False, True])
@torch.inference_mode()
def test_a_packed_linear_gives_the_same_product(merged: bool, bias: bool, num_rows: int) -> None:
    linear = new_linear(bias, merged, torch.float32)
    x = torch.randn(num_rows, 32)
    expected = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)
    linear.pack()
    assert linear.weight.is_mkldnn
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_gives_the_same_product_whether_this_cpu_packs_it_or_not(dtype: torch.dtype) -> None:
    linear = new_linear(bias=True, merged=False, dtype=dtype)
    x = torch.randn(16, 32, dtype=dtype)
    expected = linear(x)
    linear.pack()
    torch.testing.assert_close(linear(x), expected, rtol=2e-2, atol=2e-2)


@needs_onednn
@pytest.mark.parametrize("name", [UNTIED, TIED])
def test_llm_packs_every_linear_layer_on_the_cpu_and_the_values_stay(saved: Any, name: str) -> None:
    llm = new_llm(saved(name))
    runner = llm.engine.runner
    assert runner is not None
    unpacked = load(saved(name))
    packed = [(name, module) for name, module in runner.model.named_modules() if isinstance(module, Linear)]
    assert len(packed) == 2 * 4 + 1  # four in each layer, and the head
    for module_name, module in packed:
        assert module.weight.is_mkldnn
        weight = unpacked.get_submodule(module_name).weight
        torch.testing.assert_close(module.weight.to_dense(), weight.data, rtol=0, atol=0)
    embedding = runner.model.embed_tokens.weight  # is looked up, not multiplied: a tied head packs a copy
    torch.testing.assert_close(embedding.data, unpacked.embed_tokens.weight.data, rtol=0, atol=0)


@needs_onednn
def test_without_onednn_weights_stay_as_they_are(saved: Any, monkeypatch: Any) -> None:
    expected = complete(new_llm(saved(UNTIED)))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    llm = new_llm(saved(UNTIED))
    assert llm.engine.runner is not None
    assert not any(parameter.is_mkldnn for parameter in llm.engine.runner.model.parameters())
    assert complete(llm) == expected

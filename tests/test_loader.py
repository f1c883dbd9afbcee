"""The loader: where a checkpoint comes from, what is read of it, and what is refused by name."""

import json
import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from helpers import completions, greedy, make_llm
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from nanovllm.attention.reference import ReferenceAttention
from nanovllm.config import ModelConfig
from nanovllm.layers.linear import Linear
from nanovllm.models.decoder import Decoder
from nanovllm.models.loader import fit_config, load_dummy, load_weights, read_headers, resolve_model
from nanovllm.parallel.group import Group

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDED = {"max_shard_size": "20KB"}
Q_PROJ, Q_BIAS = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def copied(tiny_model, tmp_path):
    """`copied(dtype, is_tied, **options)`: a checkpoint that transformers saves with these options; a test may damage it."""

    def save(dtype=torch.float32, is_tied=False, **options):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(tie_word_embeddings=is_tied), dtype=dtype)
        model.save_pretrained(tmp_path / "model", **options)
        return tmp_path / "model"

    return save


@pytest.fixture
def opened():
    """The names of the files that Python opens during the test."""
    names = set()
    is_on = True

    def hook(event, args):
        if is_on and event == "open" and isinstance(args[0], str | Path):
            names.add(Path(args[0]).name)

    sys.addaudithook(hook)  # cannot be taken out again, hence is_on
    yield names
    is_on = False


def new_decoder(folder, tensors=None, **changes):
    """A decoder for the checkpoint, all NaN: what is not filled shows."""
    config = replace(ModelConfig.from_folder(folder, ModelConfig.from_hf), **changes)
    config = config if tensors is None else fit_config(config, tensors)
    decoder = Decoder(config, ReferenceAttention(), Group(), max_len=64)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(float("nan"))
    return decoder


def load(folder, **changes):
    tensors = read_headers(folder)
    decoder = new_decoder(folder, tensors, **changes)
    with torch.inference_mode():
        load_weights(decoder, tensors, show_progress=False)
    return decoder


def complete(llm):
    return completions(llm, [[1, 2, 3]], greedy(4, ignore_eos=True))[0][0]


def edit(folder, changes):
    """Change tensors of a checkpoint: each to another one or to what a function makes of it; None takes it out."""
    tensors = load_file(folder / WEIGHTS)
    for name, change in changes.items():
        tensors[name] = change(tensors[name]) if callable(change) else change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def assert_same_parameters(decoder, expected):
    """To the bit, whether they are packed for the CPU or not."""
    parameters = {name: parameter.to_dense() for name, parameter in decoder.named_parameters()}
    torch.testing.assert_close(parameters, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what is filled


@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float16, "auto", torch.float16),
        (torch.float16, "float32", torch.float32),
    ],
)
def test_weights_and_kv_cache_have_the_checkpoints_dtype_or_are_rounded_to_what_is_asked_for(
    copied, dtype, asked, expected
):
    llm = make_llm(folder := copied(dtype), dtype=asked)
    weights = dict(load(folder).named_parameters())
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert_same_parameters(llm.engine.runner.model, {name: weight.to(expected) for name, weight in weights.items()})
    assert {tensor.dtype for cache in llm.engine.runner.kv_cache for tensor in (cache.k, cache.v)} == {expected}


@pytest.mark.parametrize("head", ["absent", "equal", "different", "alone"])
def test_a_head_beside_a_tied_embedding_is_used_as_transformers_does(copied, head, caplog):
    if head in ("different", "alone") and transformers.__version__ < "5":
        pytest.skip("transformers 4 ties them all the same")
    folder = copied(is_tied=True)
    weight = load_file(folder / WEIGHTS)[EMBEDDING].clone()
    if head == "different":
        weight[-1, -1] += 1  # of the last piece that is compared
    edit(folder, {HEAD: None if head == "absent" else weight} | ({EMBEDDING: None} if head == "alone" else {}))
    decoder = load(folder)
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == (head != "different")
    assert ("lm_head.weight is used" in caplog.text) == (head == "different")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(decoder.lm_head.weight, model.lm_head.weight.data)
    torch.testing.assert_close(decoder.embed_tokens.weight, model.model.embed_tokens.weight.data)


def add_other_files(folder):
    for name in "consolidated", "adapter_model", "optimizer":
        save_file({"lora_A.weight": torch.ones(3)}, folder / f"{name}.safetensors")


def add_the_index_of_an_older_model(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))


def add_old_tables_of_frequencies(folder):
    names = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"
    edit(folder, {name: torch.zeros(4) for name in names})


def take_out_the_index(folder):
    add_other_files(folder)
    (folder / INDEX).unlink()


def link_a_file(folder):
    """The Hub's cache is made of links."""
    file, blob = max(folder.glob("*.safetensors")), folder.parent / "blob.safetensors"
    file.rename(blob)
    file.symlink_to(blob)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, add_other_files),
        ({}, add_the_index_of_an_older_model),
        ({}, add_old_tables_of_frequencies),
        (SHARDED, add_other_files),
        (SHARDED, take_out_the_index),
        (SHARDED, link_a_file),
    ],
)
def test_however_its_files_lie_it_is_the_same_model(tiny_model, copied, options, change, caplog):
    folder = copied(**options)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (options == SHARDED)
    change(folder)
    assert_same_parameters(load(folder), dict(load(tiny_model()).named_parameters()))
    is_told = "model.safetensors.index.json, which is beside it, is not read" in caplog.text
    assert is_told == (change is add_the_index_of_an_older_model)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q_PROJ: None}, "missing layers.1.self_attn.q_proj.weight, unexpected nothing"),
        ({NORM: None}, "missing layers.0.input_layernorm.weight, unexpected nothing"),
        ({HEAD: None}, "missing lm_head.weight, unexpected nothing"),
        ({"model.layers.2.mlp.up.weight": torch.ones(1)}, "missing nothing, unexpected model.layers.2.mlp.up.weight"),
        ({Q_BIAS: torch.ones(64)}, f"missing nothing, unexpected {Q_BIAS}"),
        (
            {NORM: None, "model.layers.0.ln_1.weight": torch.ones(32)},
            "missing layers.0.input_layernorm.weight, unexpected model.layers.0.ln_1.weight",
        ),
        ({NORM.removeprefix("model."): torch.ones(32)}, f"has {NORM} twice, in {WEIGHTS}"),
        ({HEAD: lambda w: w.T.contiguous()}, f"{WEIGHTS}: {HEAD} is F32 [32, 128], expected a float [128, 32]"),
        # Would broadcast.
        ({NORM: lambda w: w[:1].clone()}, f"{WEIGHTS}: {NORM} is F32 [1], expected a float [32]"),
        ({Q_PROJ: lambda w: w.repeat(2, 1)}, f"{WEIGHTS}: {Q_PROJ} is F32 [128, 32], expected a float [64, 32]"),
        ({Q_PROJ: lambda w: w.to(torch.int8)}, f"{WEIGHTS}: {Q_PROJ} is I8 [64, 32], expected a float [64, 32]"),
        ({Q_PROJ: lambda w: w.to(torch.int32)}, f"{WEIGHTS}: {Q_PROJ} is I32 [64, 32], expected a float [64, 32]"),
        ({Q_PROJ: lambda w: w.to(torch.float8_e4m3fn)}, f"{WEIGHTS}: {Q_PROJ} is F8_E4M3 [64, 32], expected a float"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(copied, changes, message):
    edit(folder := copied(), changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)


def test_of_many_missing_tensors_some_are_named_and_the_rest_counted(copied):
    tensors = load_file((folder := copied()) / WEIGHTS)
    edit(folder, {name: None for name in tensors if "up_proj" not in name and name != HEAD})
    counted = f"missing embed_tokens.weight, .* and {len(tensors) - 3 - 8} more, unexpected"
    with pytest.raises(ValueError, match=counted):
        load(folder)


@pytest.mark.parametrize(
    ("field", "size", "message"),
    [
        ("num_hidden_layers", 10**5, "num_hidden_layers of a checkpoint of 25 tensors must be in [1, 25], got 100000"),
        ("head_dim", 10**4, "head_dim of a checkpoint of 25 tensors must be in [1, 128], got 10000"),
        ("vocab_size", 10**6, "lm_head.weight is F32 [128, 32], expected a float [1000000, 32]"),
        ("vocab_size", 10**18, "config.json': vocab_size must be in [1, 16777216], got 1000000000000000000"),
        ("hidden_size", 2**24, "lm_head.weight is F32 [128, 32], expected a float [128, 16777216]"),
        ("intermediate_size", 2**24, "down_proj.weight is F32 [32, 48], expected a float [32, 16777216]"),
        ("num_attention_heads", 2**16, "o_proj.weight is F32 [32, 64], expected a float [32, 1048576]"),
    ],
)
def test_a_size_that_no_tensor_has_is_refused_before_anything_is_built(copied, field, size, message):
    """It would take minutes, and then all memory."""
    config = json.loads(((folder := copied()) / "config.json").read_text()) | {field: size}
    config.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(message)):
        make_llm(folder)


def test_a_missing_shard_is_named_before_anything_is_read(copied):
    shards = copied(**SHARDED)
    last = max(shards.glob("*.safetensors"))
    last.unlink()
    with pytest.raises(ValueError, match=rf"lacks {last.name}, which {INDEX} names"):
        read_headers(shards)


def test_an_index_may_not_name_a_file_elsewhere(copied, tmp_path):
    link_a_file(shards := copied(**SHARDED))
    text = (shards / INDEX).read_text()
    for elsewhere in "../blob.safetensors", str(tmp_path / "blob.safetensors"):
        (shards / INDEX).write_text(text.replace(max(shards.glob("*.safetensors")).name, elsewhere))
        with pytest.raises(ValueError, match=f"{INDEX}' is damaged.*{re.escape(elsewhere)}"):
            load(shards)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1], ids=["empty", "in the length", "in the header", "at the end"])
def test_a_truncated_file_is_named(copied, num_bytes):
    file = (folder := copied()) / WEIGHTS
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=f"'{re.escape(str(file))}' is damaged or truncated"):
        load(folder)


WEIGHT_MAPS = ["{}", "[]", "null", '{"a": 7}', '{"a": null, "b": "c"}', '{"a": ["x"]}', '{"a": ""}']


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", *(f'{{"weight_map": {content}}}' for content in WEIGHT_MAPS)])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"'{re.escape(str(tmp_path / INDEX))}' is damaged"):
        read_headers(tmp_path)


def test_a_folder_with_a_config_alone_has_no_weights(copied):
    ((folder := copied()) / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"'{re.escape(str(folder))}' has no safetensors: no weights"):
        make_llm(folder)


# -------------------------------------------------------------------------------------------------------- pickles


class Payload:
    """Unpickling it raises SystemExit."""

    def __reduce__(self):
        return sys.exit, ("a pickle was loaded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_never_opened_and_alone_it_is_refused(copied, opened, name):
    folder = copied()
    (folder / name).write_bytes(pickle.dumps(Payload()))
    opened.clear()
    assert len(complete(make_llm(folder))) == 4
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"no safetensors: only {name}, and pickles are never loaded"):
        make_llm(folder)
    assert "config.json" in opened
    assert name not in opened


# ------------------------------------------------------------------------------------------ where a model comes from


@pytest.fixture
def hub(monkeypatch):
    """The Hub's download, which a test that expects one tells what it gives."""
    download = Mock(side_effect=AssertionError("the Hub was asked"))
    monkeypatch.setattr("nanovllm.models.loader.snapshot_download", download)
    return download


@pytest.mark.usefixtures("hub")
def test_a_folder_is_used_as_it_is_and_wins_over_a_hub_id(tmp_path, monkeypatch):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in str(folder), folder, "owner/name", "~/owner/name":
        assert resolve_model(model) == folder


NEITHER = ["", "/no/such/folder", "./model", "../model", "~/no/such/folder", "model", "a/b/c", "a/b c", "https://a/b"]


@pytest.mark.parametrize("model", [*NEITHER, __file__])
def test_what_is_neither_a_folder_nor_a_hub_id_is_named_and_the_hub_is_not_asked(hub, model):
    with pytest.raises(ValueError, match=f"^model '{re.escape(model)}' is neither a folder nor a Hub id"):
        make_llm(model)
    hub.assert_not_called()


WANTED = (
    "config.json generation_config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json tokenizer.model vocab.json merges.txt chat_template.jinja"
)
UNWANTED = (
    "pytorch_model.bin pytorch_model-00001-of-00002.bin model.pt model.pth model.gguf model.onnx modeling_llama.py "
    "README.md original/model.safetensors original/params.json onnx/config.json a/b/tokenizer.json"
)


def test_of_a_hub_repository_weights_configs_and_tokenizer_are_fetched_and_nothing_else(hub, tiny_model):
    """Of the revision that is asked for; what has been fetched is loaded."""
    hub.configure_mock(side_effect=None, return_value=str(tiny_model()))
    assert complete(make_llm("owner/na.me-1", revision="v2")) == complete(make_llm(tiny_model()))
    hub.assert_called_once()
    args, options = hub.call_args
    assert args == ("owner/na.me-1",)
    assert options["revision"] == "v2"
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(f"{WANTED} {UNWANTED}".split(), **patterns)) == WANTED.split()


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("no network"), RuntimeError("no network")])
def test_a_failed_download_is_a_value_error_that_names_the_id_and_the_reason(hub, error):
    hub.side_effect = error
    with pytest.raises(ValueError, match=r"'owner/name' .*cannot be fetched from the Hub: no network") as refused:
        make_llm("owner/name")
    assert refused.value.__cause__ is error
    hub.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        resolve_model("owner/name")


# ---------------------------------------------------------------------------------------------------- dummy weights


def test_dummy_weights_need_a_config_alone_and_take_the_place_of_those_that_are_there(copied, tmp_path):
    (damaged := copied()).joinpath(WEIGHTS).write_bytes(b"damaged")
    shutil.copy(damaged / "config.json", tmp_path)
    tokens = complete(make_llm(damaged, load_format="dummy"))
    assert len(tokens) == 4
    assert complete(make_llm(tmp_path, load_format="dummy")) == tokens


def test_dummy_weights_are_repeatable_norms_ones_and_all_else_small_and_different(tiny_model):
    folder = tiny_model("llama", attention_bias=True, mlp_bias=True)
    decoder, again = new_decoder(folder), new_decoder(folder)
    with torch.inference_mode():
        load_dummy(decoder)
        torch.rand(3)  # the global generator has no part in it
        load_dummy(again)
    parameters = dict(decoder.named_parameters())
    assert_same_parameters(again, parameters)
    others = {name: parameter for name, parameter in parameters.items() if "norm" not in name}
    for parameter in others.values():
        assert 0 < parameter.abs().max() < 0.2
        assert 0.01 < parameter.std() < 0.03
    assert len({parameter.flatten()[0].item() for parameter in others.values()}) == len(others)
    assert all((parameter == 1).all() for name, parameter in parameters.items() if name not in others)


# ------------------------------------------------------------------------------------------- packing on the CPU

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_packed_linear_gives_the_same_product_whether_this_cpu_packs_its_dtype_or_not(dtype):
    linear = Linear(32, 32, bias=True, dtype=dtype)
    torch.manual_seed(0)
    for parameter in linear.parameters():
        parameter.normal_()
    inputs = [torch.randn(num_rows, 32, dtype=dtype) for num_rows in (1, 16, 100)]
    expected = [linear(x) for x in inputs]
    linear.reorder_for_cpu()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close([linear(x) for x in inputs], expected, rtol=tolerance, atol=tolerance)


@needs_onednn
@pytest.mark.parametrize("is_tied", [False, True])
def test_llm_packs_every_linear_layer_on_the_cpu_and_no_embedding(tiny_model, is_tied):
    llm = make_llm(tiny_model(tie_word_embeddings=is_tied))
    model = llm.engine.runner.model
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(linears) == 2 * 4 + 1  # four in each layer, and the head
    assert all(linear.weight.is_mkldnn for linear in linears)
    assert not model.embed_tokens.weight.is_mkldnn, "it is looked up, not multiplied: a tied head packs a copy"
    if is_tied:
        assert torch.equal(model.lm_head.weight.to_dense(), model.embed_tokens.weight)


@needs_onednn
def test_without_onednn_weights_stay_as_they_are(tiny_model, monkeypatch):
    expected = complete(make_llm(tiny_model()))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    llm = make_llm(tiny_model())
    assert not any(parameter.is_mkldnn for parameter in llm.engine.runner.model.parameters())
    assert complete(llm) == expected

"""load_weights: the same LLM with other weights gives what another LLM would, and one that failed in the middle refuses to run."""

import pytest
import torch
from helpers import PROMPTS, greedy, make_llm, tokens
from safetensors.torch import load_file, save_file

PARAMS = greedy(8, ignore_eos=True)
SOME = PROMPTS[3:9]


def read(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"family": "qwen2"}], ids=str)
@pytest.mark.parametrize("by_tensors", [False, True], ids=["a folder", "tensors"])
def test_an_llm_with_new_weights_is_another(config, by_tensors, tiny_model, device):
    folder = tiny_model(seed=5, **config)
    llm = make_llm(tiny_model(**config), device=device)
    first = tokens(llm, SOME, PARAMS)
    expected = tokens(make_llm(folder, device=device), SOME, PARAMS)
    assert first != expected
    for source, result in (folder, expected), (tiny_model(**config), first), (folder, expected):
        llm.load_weights(reversed(read(source).items()) if by_tensors else str(source))
        assert tokens(llm, SOME, PARAMS) == result


def test_a_part_is_replaced_and_the_rest_stays(tiny_model):
    llm, folder = make_llm(tiny_model()), tiny_model(seed=5)
    mixed = {name: read(folder if ".1." in name else tiny_model())[name] for name in read(folder)}
    llm.load_weights((name, tensor) for name, tensor in mixed.items() if ".1." in name)
    part = tokens(llm, SOME, PARAMS)
    llm.load_weights(mixed.items())
    assert tokens(llm, SOME, PARAMS) == part
    llm.load_weights({name.removeprefix("model."): tensor for name, tensor in read(folder).items()}.items())
    assert tokens(llm, SOME, PARAMS) == tokens(make_llm(folder), SOME, PARAMS) != part


def test_the_prefix_cache_is_emptied(tiny_model):
    llm = make_llm(tiny_model(), kvcache_block_size=4)
    llm.generate([PROMPTS[11]], PARAMS)
    llm.load_weights(tiny_model())
    assert llm.generate([PROMPTS[11]], PARAMS)[0].num_cached_tokens == 0


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.9.input_layernorm.weight", torch.ones(32), "which the model does not have"),
        ("model.norm.weight", torch.ones(5), r"model.norm.weight of source is torch.float32 \[5\], expected a float"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int32), "expected a float"),
    ],
    ids=["an unknown name", "another shape", "no float"],
)
def test_after_a_failure_in_the_middle_all_must_be_loaded(name, tensor, message, tiny_model):
    llm = make_llm(tiny_model())
    expected = tokens(llm, SOME, PARAMS)
    weights = list(read(tiny_model()).items())
    with pytest.raises(ValueError, match=message):
        llm.load_weights([*weights[:3], (name, tensor)])
    for call in (lambda: llm.generate([[1]]), lambda: llm.add_request([1]), lambda: next(llm.stream([[1]]))):
        with pytest.raises(RuntimeError, match="load_weights\\(\\) must load all"):
            call()
    llm.load_weights(weights[:5])
    with pytest.raises(RuntimeError, match="incomplete"):
        llm.generate([[1]])
    llm.load_weights(weights)
    assert tokens(llm, SOME, PARAMS) == expected


def test_what_is_refused_before_anything_is_replaced(tiny_model, tmp_path):
    llm = make_llm(tiny_model())
    expected = tokens(llm, SOME, PARAMS)
    save_file({"model.norm.weight": torch.ones(5)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected a float"):
        llm.load_weights(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        llm.load_weights(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="source must be a folder or an iterable"):
        llm.load_weights(5)
    llm.add_request(SOME[0], PARAMS)
    with pytest.raises(RuntimeError, match="no request runs"):
        llm.load_weights(tiny_model())
    while not llm.is_finished():
        llm.step()
    assert tokens(llm, SOME, PARAMS) == expected
    llm.close()
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.load_weights(tiny_model())


def test_weights_that_are_trained_leave_no_graph_behind(tiny_model):
    llm = make_llm(tiny_model())
    llm.load_weights((name, tensor.requires_grad_()) for name, tensor in read(tiny_model()).items())
    assert not any(parameter.requires_grad for parameter in llm.engine.runner.model.parameters())


@pytest.mark.gpu
def test_loads_leave_memory_level(tiny_model):
    llm = make_llm(tiny_model(), device="cuda")
    llm.load_weights(tiny_model())
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        llm.load_weights(read(tiny_model()).items())
        llm.generate([[1, 2]], PARAMS)
    assert torch.cuda.memory_allocated() == before

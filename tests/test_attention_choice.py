"""Which attention backend a model gets, and what is refused by name."""

from types import SimpleNamespace

import pytest
import torch

from nanovllm import attention, kernels
from nanovllm.attention.reference import ReferenceAttention

CUDA = torch.device("cuda")


def config(head_dim=64):
    return SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, dtype=torch.bfloat16)


@pytest.fixture
def installed(monkeypatch):
    """`installed("triton")` makes it seem that of the optional packages just these are there."""

    def pretend(*packages):
        monkeypatch.setattr(kernels, "AVAILABLE", "triton" in packages)
        monkeypatch.setattr(attention, "find_spec", lambda name: name if name in packages else None)

    return pretend


@pytest.mark.parametrize(
    ("there", "head_dim", "device"), [(["triton"], 64, "cpu"), ([], 64, "cuda"), (["triton"], 512, "cuda")]
)
def test_auto_is_the_reference_where_the_kernels_do_not_run(there, head_dim, device, installed):
    installed(*there)
    assert isinstance(attention.select("auto", config(head_dim), torch.device(device)), ReferenceAttention)


@pytest.mark.parametrize(
    ("name", "there", "missing"),
    [("triton", [], "triton"), ("flash-attn", ["triton"], "flash-attn"), ("flash-attn", ["flash_attn"], "triton")],
)
def test_a_package_that_is_not_installed_is_named(name, there, missing, installed):
    installed(*there)
    with pytest.raises(ValueError, match=f"'{name}' needs the package {missing}, which is not installed"):
        attention.select(name, config(), CUDA)


def test_head_sizes_beyond_the_kernels_are_refused():
    pytest.importorskip("triton", reason="needs triton")
    with pytest.raises(ValueError, match="head sizes up to 256, got 512"):
        attention.select("triton", config(head_dim=512), CUDA)

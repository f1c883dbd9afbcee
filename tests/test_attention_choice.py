"""Which attention backend a model gets, and what is refused by name."""

from types import SimpleNamespace

import pytest
import torch

from nanovllm import attention, kernels
from nanovllm.attention.reference import ReferenceAttention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(head_dim=64, dtype=torch.bfloat16):
    return SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, dtype=dtype)


@pytest.fixture
def installed(monkeypatch):
    """`installed("triton")` makes it seem that of the optional packages just these are there."""

    def pretend(*packages):
        monkeypatch.setattr(kernels, "AVAILABLE", "triton" in packages)
        monkeypatch.setattr(attention, "find_spec", lambda name: name if name in packages else None)

    return pretend


def test_auto_is_the_reference_without_a_gpu_or_without_triton(installed):
    installed("triton")
    assert isinstance(attention.select("auto", config(), CPU), ReferenceAttention)
    installed()
    assert isinstance(attention.select("auto", config(), CUDA), ReferenceAttention)


def test_auto_is_the_reference_for_heads_that_the_kernels_do_not_run(installed):
    installed("triton")
    assert isinstance(attention.select("auto", config(head_dim=512), CUDA), ReferenceAttention)


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

"""Which attention backend a model gets, and what is refused by name."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from nanovllm import attention, kernels
from nanovllm.attention.flash import FlashAttention
from nanovllm.attention.reference import ReferenceAttention
from nanovllm.attention.triton import TritonAttention

CUDA = torch.device("cuda")


def config(head_dim=64, dtype=torch.bfloat16):
    return SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, dtype=dtype)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(capability, *packages)` makes it seem that this is a GPU, and that of the optional packages these are there."""

    def pretend(capability, *packages):
        properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=100)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(kernels, "AVAILABLE", "triton" in packages)
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            monkeypatch.delitem(sys.modules, name)
        # as pip leaves them: flash-attn-4 has flash_attn/cute, and only flash-attn 2 has flash_attn/__init__.py
        text = "def flash_attn_varlen_func(): ..."
        if "flash-attn-4" in packages:
            (tmp_path / "flash_attn/cute").mkdir(parents=True)
            (tmp_path / "flash_attn/cute/__init__.py").write_text(text)
            (tmp_path / "flash_attn_4-4.0.dist-info").mkdir()
            (tmp_path / "flash_attn_4-4.0.dist-info/METADATA").write_text("Name: flash-attn-4\nVersion: 4.0\n")
        if "flash-attn" in packages:
            (tmp_path / "flash_attn").mkdir(exist_ok=True)
            (tmp_path / "flash_attn/__init__.py").write_text(text)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *[p for p in sys.path if "flash" not in p]])

    return pretend


@pytest.mark.parametrize(
    ("there", "head_dim", "device"), [(["triton"], 64, "cpu"), ([], 64, "cuda"), (["triton"], 512, "cuda")]
)
def test_auto_is_the_reference_where_the_kernels_do_not_run(there, head_dim, device, machine):
    machine((9, 0), *there)
    assert isinstance(attention.select("auto", config(head_dim), torch.device(device)), ReferenceAttention)


@pytest.mark.parametrize(
    ("capability", "packages", "model", "block_size", "backend"),
    [
        ((9, 0), ["flash-attn-4"], config(), None, FlashAttention),
        ((10, 0), ["flash-attn-4", "flash-attn"], config(128), 128, FlashAttention),
        ((9, 0), [], config(), None, TritonAttention),
        ((9, 0), ["flash-attn"], config(), None, TritonAttention),
        ((8, 0), ["flash-attn-4"], config(), None, TritonAttention),
        ((12, 0), ["flash-attn-4"], config(), None, TritonAttention),
        ((9, 0), ["flash-attn-4"], config(dtype=torch.float32), None, TritonAttention),
        ((9, 0), ["flash-attn-4"], config(20), None, TritonAttention),
        ((9, 0), ["flash-attn-4"], config(), 64, TritonAttention),
    ],
)
def test_auto_takes_flash_attn_4_where_it_runs(capability, packages, model, block_size, backend, machine):
    machine(capability, "triton", *packages)
    assert type(attention.select("auto", model, CUDA, block_size)) is backend


@pytest.mark.parametrize(
    ("capability", "packages", "block_size"),
    [
        ((9, 0), ["flash-attn-4", "flash-attn"], 128),
        ((8, 0), ["flash-attn-4", "flash-attn"], 256),
        ((9, 0), ["flash-attn"], 256),
    ],
)
def test_flash_attn_by_name_is_the_one_that_runs_here(capability, packages, block_size, machine):
    machine(capability, "triton", *packages)
    backend = attention.select("flash-attn", config(), CUDA)
    assert isinstance(backend, FlashAttention)
    assert backend.block_size == block_size
    with pytest.raises(ValueError, match=f"kvcache_block_size must be {block_size} .* got 16"):
        attention.select("flash-attn", config(), CUDA, 16)


def test_a_package_that_cannot_be_imported_is_passed_over_with_a_warning(machine, tmp_path, caplog):
    machine((9, 0), "triton", "flash-attn-4")
    (tmp_path / "flash_attn/cute/__init__.py").write_text("import no_such_module")
    assert type(attention.select("auto", config(), CUDA)) is TritonAttention
    assert "No module named 'no_such_module'" in caplog.text
    with pytest.raises(ValueError, match="cannot be imported: No module named 'no_such_module'"):
        attention.select("flash-attn", config(), CUDA)


@pytest.mark.parametrize(
    ("name", "capability", "packages", "missing"),
    [
        ("triton", (9, 0), [], "'triton' needs the package triton, which is not installed"),
        ("flash-attn", (9, 0), ["flash-attn-4"], "'flash-attn' needs the package triton, which is not installed"),
        (
            "flash-attn",
            (9, 0),
            ["triton"],
            "'flash-attn' needs the package flash-attn-4 and a GPU of compute capability 9.0",
        ),
        ("flash-attn", (8, 0), ["triton", "flash-attn-4"], "'flash-attn' needs the package flash-attn-4 and a GPU of"),
    ],
)
def test_what_is_missing_is_named(name, capability, packages, missing, machine):
    """flash-attn-4 alone is no flash-attn 2, though it has a folder `flash_attn` as well."""
    machine(capability, *packages)
    with pytest.raises(ValueError, match=missing):
        attention.select(name, config(), CUDA)


@pytest.mark.parametrize("name", ["triton", "flash-attn"])
def test_what_a_backend_cannot_run_is_refused(name, machine):
    machine((9, 0), "triton", "flash-attn-4")
    with pytest.raises(ValueError, match=r"head sizes up to 256.*, got 512"):
        attention.select(name, config(512), CUDA)
    if name == "flash-attn":
        with pytest.raises(ValueError, match=r"bfloat16 or float16, got torch\.float32"):
            attention.select(name, config(dtype=torch.float32), CUDA)
        with pytest.raises(ValueError, match="needs a GPU, got device 'cpu'"):
            attention.select(name, config(), torch.device("cpu"))

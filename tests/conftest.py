"""Tiny random models of every family, and the demo model where it has been fetched."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined
    torch.set_num_threads(1)  # tiny models spend their time on handing out work

from helpers import make_llm

from nanovllm import LLM

DEMO_MODEL = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"
CONFIGS = {"qwen3": transformers.Qwen3Config, "qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def make_model(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random model in float32: every parameter random, biases and norms too."""
    torch.manual_seed(seed)
    config = CONFIGS[family](**(SIZES | ({"head_dim": 16} if family == "qwen3" else {}) | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("gpu"):
            (num,) = mark.args or (1,)
            if torch.cuda.device_count() < num:
                reason = "needs a CUDA device" if num == 1 else f"needs {num} CUDA devices"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **config)`: the folder of a random model, made once for each set of arguments."""
    made: dict[str, Path] = {}

    def make(family: str = "qwen3", **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return make


@pytest.fixture
def llm(tiny_model: Callable[..., Path]) -> LLM:
    return make_llm(tiny_model())


@pytest.fixture(scope="session")
def demo_model() -> Path:
    if not (DEMO_MODEL / "config.json").is_file():
        pytest.skip("the demo model is not there; `make test` fetches it")
    return DEMO_MODEL


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> LLM:
    return LLM(demo_model, dtype="float32", max_model_len=256, max_num_seqs=16, device="cpu", use_tqdm=False)


@pytest.fixture(scope="session")
def text_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A random model with the demo model's tokenizer: quick, and in float32, whose tokens do not depend on the batch."""
    folder = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(tiny_model("llama", vocab_size=49152), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model / name, folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_layers() -> None:
    """Models of many shapes would reach the limit of how often one layer is compiled."""
    if torch.cuda.is_available():
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def exact_demo_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a checkpoint in float32: what it says in bfloat16 depends on the CPU."""
    folder = tmp_path_factory.mktemp("exact")
    for file in demo_model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((demo_model / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder

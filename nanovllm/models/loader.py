"""The loader: finds a checkpoint and fills a model from its safetensors, every name accounted for.

Tensors are read one at a time and copied to the part of a parameter that they fill: nothing is held twice. Of a tensor
that is cut between ranks, each reads its own share.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from nanovllm.config import read_json
from nanovllm.distributed import Share
from nanovllm.layers.linear import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_model(model: str | os.PathLike[str], revision: str | None = None, option: str = "model") -> Path:
    """The folder of a model: a local one as it is, a Hub id downloaded (safetensors, configs and tokenizer alone).

    Args:
        option: what errors call it.

    Raises:
        ValueError: there is no such folder, and it is not a Hub id that can be fetched.
    """
    name = str(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"{option} {name!r} is neither a folder nor a Hub id of the form 'owner/name'")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
    except Exception as error:
        raise ValueError(f"{option} {name!r} is no folder and cannot be fetched from the Hub: {error}") from error


def load_weights(model: nn.Module, folder: Path, show_progress: bool) -> None:
    """Fill every parameter of `model` from the safetensors in `folder`.

    Raises:
        ValueError: no safetensors, a file that is missing or damaged, a tensor of another shape or no float, or names
            that are missing, unexpected or there twice; each with its name.
    """
    unfilled = parameter_targets(model)
    # What a checkpoint may repeat: the names of shared parameters (a tied head), and old tables of frequencies.
    own_names = {name for name, _ in model.named_parameters()}
    redundant = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own_names
    unexpected = []
    with tqdm(total=len(unfilled), desc="Loading weights", unit="tensor", disable=not show_progress) as bar:
        for name, tensor, file in read_tensors(folder):
            target = unfilled.pop(name.removeprefix("model."), None)
            if target is not None:
                target.fill(tensor, f"{file.name}: {name}")
                bar.update()
            elif name not in redundant and not name.endswith("rotary_emb.inv_freq"):
                unexpected.append(name)
    if unfilled or unexpected:
        misfits = f"missing {_some(list(unfilled))}, unexpected {_some(unexpected)}"
        raise ValueError(f"checkpoint {str(folder)!r} does not fit the model: {misfits}")


def load_dummy(model: nn.Module) -> None:
    """Fill `model` with repeatable random weights: norms 1, biases and matrices normal with deviation 0.02."""
    for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator(parameter.device).manual_seed(seed)
        mean, deviation = (1.0, 0.0) if "norm" in name else (0.0, 0.02)
        parameter.normal_(mean, deviation, generator=generator)


class Target(NamedTuple):
    """A parameter, or a part of a merged one, and the share of a checkpoint's tensor, cut in one dimension, that fills it."""

    view: Tensor
    share: Share
    dim: int = 0

    def fill(self, tensor: Any, name: str) -> None:
        """Read the share of a checkpoint's tensor; the last ranks may find less than their share's size."""
        start, size, total = self.share
        shape, dtype = list(tensor.get_shape()), tensor.get_dtype()
        expected = [total if i == self.dim else length for i, length in enumerate(self.view.shape)]
        if shape != expected or dtype not in ("BF16", "F16", "F32", "F64"):
            raise ValueError(f"{name} is {dtype} {shape}, expected a float {expected}")
        own = slice(min(start, total), min(start + size, total))
        part = tensor[(slice(None),) * self.dim + (own,)]
        self.view.narrow(self.dim, 0, part.shape[self.dim]).copy_(part)


def parameter_targets(model: nn.Module) -> dict[str, Target]:
    """Checkpoint name (without "model.") → what it fills.

    A parameter that two modules share (a tied head) is filled under the first one's name.
    """
    targets: dict[str, Target] = {}
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, ColumnParallelLinear):
            parent = path.rpartition(".")[0]
            views = parameter.split([share.size for share in module.parts.values()])
            for (part, share), view in zip(module.parts.items(), views, strict=True):
                targets[f"{parent}.{part}.{kind}".removeprefix(".")] = Target(view, share)
        elif kind == "weight" and isinstance(module, RowParallelLinear | ParallelEmbedding):
            targets[name] = Target(parameter, module.share, dim=1 if isinstance(module, RowParallelLinear) else 0)
        else:
            targets[name] = Target(parameter, Share(0, len(parameter), len(parameter)))
    return targets


def read_tensors(folder: Path) -> Iterator[tuple[str, Any, Path]]:
    """Every tensor of the checkpoint in `folder`, its name, a slice of it that is not read yet, and its file."""
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is no dict)
                    yield name, tensors.get_slice(name), file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(file)!r} is damaged or truncated: {error}") from error


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not weight_map or not isinstance(weight_map, dict):
            raise ValueError(f"{str(index)!r} is damaged: it has no weight_map")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"checkpoint {str(folder)!r} lacks {_some(missing)}, which {index.name} names")
    elif not files:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        found = f"only {_some(pickles)}, and pickles are never loaded" if pickles else "no weights"
        raise ValueError(f"model folder {str(folder)!r} has no safetensors: {found}")
    return files


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "nothing"

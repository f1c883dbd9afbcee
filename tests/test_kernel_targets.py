"""The kernels compile for the GPUs that people own, within the shared memory that those have.

Compiling needs no GPU, but a process in which Triton does not interpret.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs triton")

MAX_SHARED_MEMORY = 99 * 1024  # of a program on sm_86 and sm_89
COMPILE = """
import itertools, json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanovllm.attention.triton import decode_tiles, descriptors_pay, prompt_tiles
from nanovllm.parallel.all_reduce import all_reduce_kernel
from nanovllm.kernels import few_rows
from nanovllm.kernels.decode_inputs import decode_inputs_kernel
from nanovllm.kernels.gumbel import gumbel_max_kernel, unpack_kernel
from nanovllm.extras.logprobs_kernel import norm_and_rank_kernel
from nanovllm.kernels.paged_attention import decode_attention_kernel, prompt_attention_kernel
from nanovllm.kernels.rotary_store import norm_rotate_store_kernel
from nanovllm.extras.truncation_kernel import UNUSED_BITS, least_kept_kernel

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
OTHERS = (
    all_reduce_kernel, decode_inputs_kernel, gumbel_max_kernel, unpack_kernel, least_kept_kernel, norm_and_rank_kernel,
    norm_rotate_store_kernel,
)

def memory(kernel, capability, types, constants, **options):
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*i32") for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared

def attention_memory(is_decode, capability, head_dim, group, dtype):
    data_type, kernel = getattr(torch, dtype), decode_attention_kernel if is_decode else prompt_attention_kernel
    has_descriptors = descriptors_pay(head_dim, data_type, 64, capability)
    tiles = (decode_tiles if is_decode else prompt_tiles)(head_dim, group, data_type, has_descriptors)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if tiles.get(name)}
    constants = {
        "BLOCK_SIZE": 64, "H_KV": 8, "G": group, "D": head_dim, "DP": triton.next_power_of_2(head_dim),
        "PRECISION": "ieee" if dtype == "float32" else "tf32", "IS_DEPENDENT": capability >= 90, **tiles,
    }
    types = dict.fromkeys(("q_ptr", "k_cache", "v_cache", "out_ptr"), "*" + TYPES[dtype])
    types |= {"partial_out": "*fp32", "partial_lse": "*fp32", "scale": "fp32", "q_stride": "i32", "table_stride": "i32"}
    if has_descriptors:
        types |= dict.fromkeys(("k_tiles", "v_tiles"), f"tensordesc<{TYPES[dtype]}[{tiles['N']}, {head_dim}]>")
    else:
        constants |= {"k_tiles": None, "v_tiles": None}
    return memory(kernel, capability, types, constants, **options)

def other_memory(kernel, capability, dtype):
    constants = {
        "SHIFT": UNUSED_BITS[getattr(torch, dtype)], "HAS_LEAST": True, "BLOCK": 8192, "RANK": 0, "SIZE": 4,
        "LANES": 4, "NUM_PASSES": 2, "H": 32, "H_KV": 8, "D": 128, "HEADS": 64, "HALF": 64, "HAS_NORM": True,
        "IS_DEPENDENT": capability >= 90, "BLOCK_SIZE": 64,
    }
    floats = ("x", "logits", "drawn", "qkv", "q_norm", "k_norm", "k_cache", "v_cache")
    numbers = ("n", "capacity", "vocab_size", "stride", "per_split", "cos_stride", "num_rows", "table_stride")
    types = dict.fromkeys(floats, "*" + TYPES[dtype]) | dict.fromkeys(numbers, "i32") | {"eps": "fp32"}
    types |= dict.fromkeys(("best", "memories", "turns", "slots"), "*i64")
    types |= dict.fromkeys(("least", "norm", "cos_ptr", "sin_ptr"), "*fp32")
    return memory(kernel, capability, types, constants, num_warps=16)

def product_memory(capability, num_rows, in_features, has_norm, dtype):
    tile = few_rows.tile(num_rows, in_features, has_norm, has_norm, getattr(torch, dtype))
    constants = {name: True for name in few_rows.product_kernel.arg_names if name.startswith(("HAS", "IS"))}
    constants |= {"K": in_features, "HAS_NORM": has_norm, "IS_GATED": has_norm, "IS_DEPENDENT": capability >= 90, **tile}
    types = dict.fromkeys(("x", "residual", "total", "norm", "w", "bias", "out"), "*" + TYPES[dtype])
    types |= {"num_rows": "i32", "num_outputs": "i32", "eps": "fp32"}
    return memory(few_rows.product_kernel, capability, types, constants, num_warps=constants.pop("num_warps"))

capabilities, shapes, dtypes = json.loads(sys.argv[1])
for capability, (head_dim, group), dtype in itertools.product(capabilities, shapes, dtypes):
    for is_decode in (True, False):
        taken = attention_memory(is_decode, capability, head_dim, group, dtype)
        print(json.dumps([is_decode, capability, head_dim, group, dtype, taken]))
for capability, dtype, kernel in itertools.product(capabilities, dtypes, OTHERS):
    print(json.dumps([kernel.__name__, capability, dtype, other_memory(kernel, capability, dtype)]))
for capability, (in_features, has_norm), dtype in itertools.product(capabilities, ((1024, True), (3072, False)), dtypes):
    # Of several rows only Hopper's GPUs are given products, whose programs have 227 kilobytes.
    more = [product_memory(capability, n, in_features, has_norm, dtype) for n in (8, 16) if capability == 90 and dtype != "float32"]
    assert all(memory <= 227 * 1024 for memory in more), more
    print(json.dumps(["product_kernel", capability, dtype, product_memory(capability, 1, in_features, has_norm, dtype)]))
"""


@pytest.mark.parametrize(
    ("capabilities", "shapes", "dtypes"),
    [
        ([86, 90], [[128, 2]], ["bfloat16", "float32"]),
        pytest.param(
            [80, 86, 89, 90],
            [[64, 1], [64, 3], [80, 4], [96, 8], [128, 4], [128, 7], [128, 16], [256, 2], [256, 64]],
            ["bfloat16", "float16", "float32"],
            marks=[pytest.mark.slow, pytest.mark.timeout(1800)],
        ),
    ],
    ids=["some", "all"],
)
def test_kernels_compile_within_99_kilobytes(capabilities, shapes, dtypes):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps([capabilities, shapes, dtypes])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(compiled) == (2 * len(shapes) + 9) * len(capabilities) * len(dtypes)
    assert [c for c in compiled if c[-1] > MAX_SHARED_MEMORY] == []

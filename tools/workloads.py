"""The benchmark's workloads: random prompts, and how long each output is."""

from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

VOCABULARY = 10000  # the highest token id in the prompts


class Prefix(NamedTuple):
    """Tokens start … end-1 of some requests' prompts, which they have in common."""

    start: int
    end: int
    requests: range  # their indices


@dataclass(frozen=True)
class Workload:
    """Requests of uniformly random lengths. With seeds of their own, workloads share no prompts in the prefix cache."""

    num_seqs: int
    input_len: tuple[int, int]  # least and most, beside the shared prefixes
    output_len: tuple[int, int]
    # A tree of prefixes: for each level how many of them follow each one of the level above, and how many tokens they have.
    shared: tuple[tuple[int, int], ...] = ()
    num_samples: int = 1  # of each request
    temperature: float = 0.6
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)  # what else is asked of every request

    @property
    def prefixes(self) -> list[Prefix]:
        """Those that requests share, level by level. Request i has the i-th path through the tree, modulo their number."""
        found, num_paths, start = [], 1, 0
        for num_children, num_tokens in self.shared:
            num_paths *= num_children
            end = start + num_tokens
            found += [Prefix(start, end, range(i, self.num_seqs, num_paths)) for i in range(num_paths)]
            start = end
        return found

    def requests(self, pass_number: int) -> tuple[list[list[int]], list[int]]:
        """(prompts, output lengths) of a pass, counted from 0."""
        random = Random(self.seed)
        shared = [random_tokens(random, prefix.end - prefix.start) for prefix in self.prefixes]
        own = [random_tokens(random, random.randint(*self.input_len)) for _ in range(self.num_seqs)]
        output_lens = [random.randint(*self.output_len) for _ in range(self.num_seqs)]
        if pass_number > 0:
            random = Random(f"seed {self.seed}, pass {pass_number}")
            shared = [random_tokens(random, len(tokens)) for tokens in shared]
            own = [random_tokens(random, len(tokens)) for tokens in own]
        prompts: list[list[int]] = [[] for _ in own]
        for prefix, tokens in zip(self.prefixes, shared, strict=True):
            for i in prefix.requests:
                prompts[i] += tokens
        return [before + tokens for before, tokens in zip(prompts, own, strict=True)], output_lens


def random_tokens(random: Random, count: int) -> list[int]:
    return [random.randint(0, VOCABULARY) for _ in range(count)]


WORKLOADS = {
    "classic": Workload(256, (100, 1024), (100, 1024), seed=0),
    "single": Workload(1, (100, 100), (512, 512), seed=1),
    "eight": Workload(8, (256, 512), (512, 512), seed=2),
    "many": Workload(1024, (64, 512), (64, 256), seed=3),
    "prefill": Workload(64, (4096, 4096), (1, 1), seed=4),
    "long": Workload(16, (24_000, 32_000), (128, 128), seed=5),
    "prefix": Workload(256, (64, 64), (128, 128), shared=((1, 2048),), seed=6),
    "prefix-512": Workload(256, (64, 64), (256, 256), shared=((1, 512),), seed=7),
    "tree": Workload(256, (64, 64), (128, 128), shared=((4, 1024), (4, 512)), seed=8),
    "samples": Workload(1, (1024, 1024), (512, 512), num_samples=64, seed=9),
}
OPTIONS_FOR_ALL = {"max_model_len": 36_000, "max_num_seqs": 1024, "gpu_memory_utilization": 0.85}
CPU_WORKLOAD = Workload(16, (16, 256), (16, 256), temperature=0.0)

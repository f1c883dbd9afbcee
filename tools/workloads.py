"""The benchmark's workloads: random prompts, and how long each output is."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

VOCABULARY = 10000  # the highest token id in the prompts


@dataclass(frozen=True)
class Workload:
    """Requests of uniformly random lengths. With seeds of their own, workloads share no prompts in the prefix cache."""

    num_seqs: int
    input_len: tuple[int, int]  # least and most, beside the shared prefix
    output_len: tuple[int, int]
    shared_prefix: int = 0  # so many tokens begin every prompt of a pass
    temperature: float = 0.6
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)  # what else is asked of every request

    def requests(self, pass_number: int) -> tuple[list[list[int]], list[int]]:
        """(prompts, output lengths) of a pass, counted from 0."""
        random = Random(self.seed)
        shared = random_tokens(random, self.shared_prefix)
        own = [random_tokens(random, random.randint(*self.input_len)) for _ in range(self.num_seqs)]
        output_lens = [random.randint(*self.output_len) for _ in range(self.num_seqs)]
        if pass_number > 0:
            random = Random(f"seed {self.seed}, pass {pass_number}")
            shared = random_tokens(random, len(shared))
            own = [random_tokens(random, len(tokens)) for tokens in own]
        return [shared + tokens for tokens in own], output_lens


def random_tokens(random: Random, count: int) -> list[int]:
    return [random.randint(0, VOCABULARY) for _ in range(count)]


WORKLOADS = {
    "classic": Workload(256, (100, 1024), (100, 1024), seed=0),
    "single": Workload(1, (100, 100), (512, 512), seed=1),
    "eight": Workload(8, (256, 512), (512, 512), seed=2),
    "many": Workload(1024, (64, 512), (64, 256), seed=3),
    "prefill": Workload(64, (4096, 4096), (1, 1), seed=4),
    "long": Workload(16, (24_000, 32_000), (128, 128), seed=5),
    "prefix": Workload(256, (64, 64), (128, 128), shared_prefix=2048, seed=6),
}
OPTIONS_FOR_ALL = {"max_model_len": 36_000, "max_num_seqs": 1024, "gpu_memory_utilization": 0.85}
CPU_WORKLOAD = Workload(16, (16, 256), (16, 256), temperature=0.0)

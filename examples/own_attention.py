"""An attention of one's own: a sliding window with attention sinks, in plain PyTorch.

python examples/own_attention.py                                # how well three attentions predict this project's README
python examples/own_attention.py --window 128 --sinks 1 my.txt

A token sees the last `window` tokens and the first few of its sequence, the sinks, onto which models put the attention
that they have no use for (StreamingLLM, Xiao et al., arXiv 2309.17453). Positions stay those of the text, where
StreamingLLM counts them within what is visible.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.attention import AttentionBackend
from nanovllm.engine.batch import Batch

PROJECT = Path(__file__).resolve().parent.parent
DEMO_MODEL = PROJECT / "models" / "SmolLM2-135M-Instruct"


class SlidingWindow(AttentionBackend):
    """Causal attention to the last `window` tokens, the token itself among them, and to the first `num_sinks`."""

    def __init__(self, window: int, num_sinks: int = 4) -> None:
        self.window, self.num_sinks = window, num_sinks

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> Tensor:
        """One sequence after the other. A decode step is a chunk of one token: the last of its context."""
        out = torch.empty_like(q)
        tables = batch.block_tables[batch.rows]
        end = 0
        lens = zip(tables, batch.query_lens.tolist(), batch.cpu_context_lens.tolist(), strict=True)
        for table, query_len, context_len in lens:
            start, end = end, end + query_len
            blocks = table[: -(-context_len // batch.block_size)]
            k = k_cache[blocks].flatten(0, 1)[:context_len].transpose(0, 1)  # [H_kv, context, D]
            v = v_cache[blocks].flatten(0, 1)[:context_len].transpose(0, 1)
            keys = torch.arange(context_len, device=q.device)
            queries = keys[-query_len:, None]
            mask = (keys <= queries) & ((keys > queries - self.window) | (keys < self.num_sinks))
            attended = F.scaled_dot_product_attention(
                q[start:end].transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True
            )
            out[start:end] = attended[0].transpose(0, 1)
        return out


def perplexity(llm: LLM, token_ids: list[int]) -> float:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate(token_ids, params, use_tqdm=False)
    rows = output.prompt_logprobs or []
    logprobs = [row[token].logprob for token, row in zip(token_ids, rows, strict=True) if row]
    return math.exp(-sum(logprobs) / len(logprobs))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, default=PROJECT / "README.md", help="a file")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub id (default: the demo model)")
    parser.add_argument("--window", type=int, default=64, help="tokens (default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=4, help="tokens (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the text (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.model == DEMO_MODEL and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")

    backends: dict[str, str | AttentionBackend] = {
        "all tokens": "auto",
        f"{args.window} tokens and {args.sinks} sinks": SlidingWindow(args.window, args.sinks),
        f"{args.window} tokens": SlidingWindow(args.window, 0),
    }
    found = {}
    for name, backend in backends.items():
        with LLM(args.model, dtype=args.dtype, attention_backend=backend, use_tqdm=False) as llm:
            token_ids = llm.tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"][: args.length]
            found[name] = perplexity(llm, token_ids)
            print(f"each token sees {name:24} perplexity {found[name]:8.2f}")
    return found


if __name__ == "__main__":
    main()

"""Best of n: draw n answers and keep the one whose tokens the model finds likeliest on average.

python examples/best_of_n.py
python examples/best_of_n.py --n 16 --temperature 1.2 "What is the largest planet?"

The mean, not the sum: a sum would favour whichever answer is shortest.
"""

import argparse
from pathlib import Path

from nanovllm import LLM, CompletionOutput, SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"


def mean_logprob(completion: CompletionOutput) -> float:
    assert completion.cumulative_logprob is not None, "logprobs must be asked for"
    return completion.cumulative_logprob / len(completion.token_ids)


def main(argv: list[str] | None = None) -> list[CompletionOutput]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="Why is the sky blue? Answer in one sentence.")
    parser.add_argument("--n", type=int, default=4, help="answers to draw (default: %(default)s)")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub id (default: the demo model)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="above 0 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the same answers (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.model == DEMO_MODEL and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")

    params = SamplingParams(
        n=args.n, temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed, logprobs=0
    )
    with LLM(args.model) as llm:
        (output,) = llm.chat([{"role": "user", "content": args.question}], params, use_tqdm=False)
    ranked = sorted(output.outputs, key=mean_logprob, reverse=True)
    for completion in ranked:
        print(f"{mean_logprob(completion):7.3f}  {completion.text.strip()}")
    print(f"\nBest: {ranked[0].text.strip()}")
    return ranked


if __name__ == "__main__":
    main()

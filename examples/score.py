"""How likely a model finds texts: their perplexity, or the log-probability of answers to a question.

python examples/score.py "The cat sat on the mat." "Mat the on sat cat the."
python examples/score.py --question "The capital of France is" " Rome." " Paris." " Berlin."
"""

import argparse
import math
from pathlib import Path

from nanovllm import LLM, SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"


def log_probabilities(llm: LLM, texts: list[str], question: str = "") -> list[list[float]]:
    """Of each token of each text after the question; without one, of each but the first, which nothing comes before."""
    question_ids = llm.tokenizer(question)["input_ids"] if question else []
    token_ids = llm.tokenizer(texts, add_special_tokens=not question)["input_ids"]
    # A request draws a token at least; 0 others are reported beside each token of the prompt.
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([question_ids + ids for ids in token_ids], params, use_tqdm=False)
    scores = []
    for output, ids in zip(outputs, token_ids, strict=True):
        rows = (output.prompt_logprobs or [])[len(question_ids) :]
        scores.append([row[token].logprob for token, row in zip(ids, rows, strict=True) if row])
    return scores


def main(argv: list[str] | None = None) -> list[tuple[float, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="text")
    parser.add_argument("--question", default="", help="what comes before each text, and is not scored itself")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub id (default: the demo model)")
    args = parser.parse_args(argv)
    if args.model == DEMO_MODEL and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")

    with LLM(args.model) as llm:
        scores = log_probabilities(llm, args.texts, args.question)
    ranked = sorted(zip(map(sum, scores), map(len, scores), args.texts, strict=True), reverse=True)
    print("log-prob.  tokens  perplexity  text")
    for total, length, text in ranked:
        print(f"{total:9.2f}  {length:6}  {math.exp(-total / max(length, 1)):10.2f}  {text.strip()}")
    return [(total, text) for total, _, text in ranked]


if __name__ == "__main__":
    main()

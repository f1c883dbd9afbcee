"""Ask a chat model a few questions, all in one batch.

python example.py                                        # the demo model, which `make demo` fetches
python example.py --model Qwen/Qwen3-0.6B "Who was Ada Lovelace?" "Name three prime numbers."
"""

import argparse
import time
from pathlib import Path

from nanovllm import LLM, SamplingParams

DEMO_MODEL = Path(__file__).parent / "models" / "SmolLM2-135M-Instruct"
QUESTIONS = [
    "What is the capital of France? Answer in one sentence.",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a brave cat.",
    "Why should I drink water every day?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=QUESTIONS, metavar="prompt", help="questions to the model")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub id (default: the demo model)")
    parser.add_argument("--max-tokens", type=int, default=96, help="of each answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    args = parser.parse_args()
    if args.model == DEMO_MODEL and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")

    llm = LLM(args.model)
    prompts = args.prompts
    if llm.tokenizer.chat_template:
        prompts = [
            llm.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)

    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start

    for question, output in zip(args.prompts, outputs, strict=True):
        print(f"\nPrompt:     {question}\nCompletion: {output['text'].strip()}")
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(output["token_ids"]) for output in outputs)
    print(
        f"\n{num_prompt} prompt tokens and {num_output} output tokens in {seconds:.2f}s: {num_output / seconds:.1f} tok/s"
    )


if __name__ == "__main__":
    main()

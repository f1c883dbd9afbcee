"""Stream the answers to several prompts at once: one column each, and a line for each increment.

python examples/stream.py
python examples/stream.py --race "Name a colour." "Name a colour and say why you like it."   # until one has answered
"""

import argparse
from pathlib import Path

from nanovllm import LLM, SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
QUESTIONS = ["What is the capital of France?", "Why is the sky blue?", "Count from one to ten."]


def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS, metavar="question")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub id (default: the demo model)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer (default: %(default)s)")
    parser.add_argument("--race", action="store_true", help="stop when the first answer is finished")
    args = parser.parse_args(argv)
    if args.model == DEMO_MODEL and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")

    texts = [""] * len(args.questions)
    with LLM(args.model) as llm:
        prompts = [
            llm.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            for question in args.questions
        ]
        for new in llm.stream(prompts, SamplingParams(temperature=0, max_tokens=args.max_tokens)):
            texts[new.prompt_index] += new.text
            end = f" [{new.finish_reason}]" if new.finish_reason else ""
            print(f"{'':{24 * new.prompt_index}}{new.text!r}{end}")
            if args.race and new.finish_reason:
                break  # the requests that still run are dropped, and the LLM takes the next ones

    for question, text in zip(args.questions, texts, strict=True):
        print(f"\nPrompt:     {question}\nCompletion: {text.strip()}")
    return texts


if __name__ == "__main__":
    main()

"""Chat with a model in the terminal; the end of the input (Ctrl-D) ends it, Ctrl-C cuts an answer short.

python examples/chat.py
python examples/chat.py --model Qwen/Qwen3-0.6B --system "You answer in rhymes." --temperature 0.6
printf 'What is the capital of France?\nAnd of Italy?\n' | python examples/chat.py

The whole conversation is the prompt of every turn; what the turns before computed is found in the prefix cache.
"""

import argparse
from pathlib import Path

from nanovllm import LLM, SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
Messages = list[dict[str, str]]


def make_prompt(llm: LLM, system: Messages, turns: Messages, max_tokens: int) -> list[int]:
    """Token ids of the conversation; the oldest turns are left out where no room is left for the answer."""
    prompt: list[int] = []
    for start in range(0, len(turns), 2):  # a turn is a question and its answer
        messages = system + turns[start:]
        prompt = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(prompt) + max_tokens <= llm.max_model_len:
            break
    return prompt


def say(llm: LLM, prompt: list[int], params: SamplingParams) -> str:
    """Print the answer as it comes, and return it."""
    text = ""
    try:
        for increment in llm.stream([prompt], params):
            print(increment.text, end="", flush=True)
            text += increment.text
    except KeyboardInterrupt:
        pass  # the answer is what was said so far
    print()
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub id (default: the demo model)")
    parser.add_argument("--system", help="what the model is told before the first turn")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.model == DEMO_MODEL and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    system = [{"role": "system", "content": args.system}] if args.system else []
    turns: Messages = []
    with LLM(args.model) as llm:
        while True:
            try:
                turns.append({"role": "user", "content": input("\nYou: ")})
            except (EOFError, KeyboardInterrupt):
                return print()
            print("Model: ", end="", flush=True)
            try:
                answer = say(llm, make_prompt(llm, system, turns, args.max_tokens), params)
                turns.append({"role": "assistant", "content": answer})
            except ValueError as error:  # a question that is too long by itself
                print(error)
                turns.pop()


if __name__ == "__main__":
    main()

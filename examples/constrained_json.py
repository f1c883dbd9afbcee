"""Answers that keep to a JSON schema or a regular expression: a logits processor on `pip install llguidance`.

python examples/constrained_json.py                                  # three answers, each of another schema
python examples/constrained_json.py --regex "(19|20)[0-9]{2}" "When did people first walk on the Moon?"
python examples/constrained_json.py --schema schema.json --model Qwen/Qwen3-0.6B "Describe Paris."
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from nanovllm import LLM, RequestOutput, SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
TEXT = {"type": "string", "maxLength": 40}
WORD = {"type": "string", "pattern": "^[a-z]{2,15}$"}
YEAR = {"type": "integer", "minimum": 1000, "maximum": 2100}
CONTINENT = {"enum": ["Africa", "America", "Asia", "Australia", "Europe"]}


def fields(**properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with these fields and no others."""
    required = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties} | required


QUESTIONS = {
    "Describe the city of Paris in JSON.": fields(name=TEXT, country=TEXT, continent=CONTINENT),
    "Extract the facts as JSON: Ada Lovelace was an English mathematician, born in London in 1815.": fields(
        name=TEXT, profession=TEXT, born=YEAR
    ),
    "Name three fruits in JSON.": {"type": "array", "items": WORD, "minItems": 3, "maxItems": 3},
}


class Constraint:
    """A logits processor that leaves only tokens after which an answer can still become one of the grammar.

    It is a function of the answer so far; what it keeps saves parsing that from its start for every token. So
    each request should have its own, and nothing goes wrong where answers share one: n > 1, parameters that
    are used again.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self.matcher = LLMatcher(tokenizer, grammar)
        if self.matcher.is_error():
            raise ValueError(self.matcher.get_error())
        self.parsed: list[int] = []

    def __call__(self, answer: list[int], logits: torch.Tensor) -> torch.Tensor:
        if answer[: len(self.parsed)] != self.parsed:
            self.matcher.reset()
            self.parsed = []
        self.matcher.consume_tokens(answer[len(self.parsed) :])
        self.parsed = list(answer)
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
        return logits.masked_fill(allowed.to(logits.device) == 0, -torch.inf)


def json_grammar(schema: dict[str, Any]) -> str:
    """The schema's grammar, with spaces where models like them: free to, some add spaces for ever."""
    return LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    )


def ask(llm: LLM, requests: list[tuple[str, str]], **options: Any) -> list[RequestOutput]:
    """Answer (question, grammar) pairs in one batch."""
    vocab_size = llm.engine.model_config.vocab_size  # of the logits; a tokenizer may have fewer tokens
    tokenizer = from_tokenizer(llm.get_tokenizer(), n_vocab=vocab_size)
    constraints = [Constraint(tokenizer, grammar) for _, grammar in requests]
    params = [SamplingParams(logits_processors=[constraint], **options) for constraint in constraints]
    return llm.chat([[{"role": "user", "content": question}] for question, _ in requests], params)


def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="question", help="asked in place of the three here")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--schema", type=Path, help="file with the JSON schema of the answers")
    form.add_argument("--regex", help="regular expression that the answers match")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub id (default: the demo model)")
    args = parser.parse_args(argv)
    if bool(args.questions) != bool(args.schema or args.regex):
        parser.error("questions need --schema or --regex, and these need questions")
    if args.model == DEMO_MODEL and not DEMO_MODEL.is_dir():
        raise SystemExit("the demo model is not there: run `make demo` once, or name a model with --model")

    requests = [(question, json_grammar(schema)) for question, schema in QUESTIONS.items()]
    if args.questions:
        from_regex = LLMatcher.grammar_from_regex
        grammar = from_regex(args.regex) if args.regex else json_grammar(json.loads(args.schema.read_text()))
        requests = [(question, grammar) for question in args.questions]
    with LLM(args.model) as llm:
        outputs = ask(llm, requests, temperature=0, max_tokens=256)
    for (question, _), output in zip(requests, outputs, strict=True):
        is_json = not args.regex and output["finish_reason"] == "stop"  # else it was cut at max_tokens
        print(f"\n{question}\n{json.loads(output['text']) if is_json else output['text']}")
    return [output["text"] for output in outputs]


if __name__ == "__main__":
    main()

"""Answers that keep to a JSON schema or a regular expression, by `pip install "nanovllm[structured-outputs]"`.

python examples/constrained_json.py                                  # three answers, each of another schema
python examples/constrained_json.py --regex "(19|20)[0-9]{2}" "When did people first walk on the Moon?"
python examples/constrained_json.py --schema schema.json --model Qwen/Qwen3-0.6B "Describe Paris."
"""

import argparse
import json
from pathlib import Path
from typing import Any

from nanovllm import LLM, SamplingParams, StructuredOutputsParams

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

    forms = {question: StructuredOutputsParams(json=schema) for question, schema in QUESTIONS.items()}
    if args.questions:
        json_schema = args.schema.read_text() if args.schema else None
        forms = dict.fromkeys(args.questions, StructuredOutputsParams(json=json_schema, regex=args.regex))
    params = [SamplingParams(temperature=0, max_tokens=256, structured_outputs=form) for form in forms.values()]
    with LLM(args.model) as llm:
        outputs = llm.chat([[{"role": "user", "content": question}] for question in forms], params)
    for question, output in zip(forms, outputs, strict=True):
        is_json = not args.regex and output["finish_reason"] == "stop"  # else it was cut at max_tokens
        print(f"\n{question}\n{json.loads(output['text']) if is_json else output['text']}")
    return [output["text"] for output in outputs]


if __name__ == "__main__":
    main()

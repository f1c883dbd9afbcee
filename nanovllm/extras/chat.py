"""Chat: conversations through the tokenizer's chat template."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Environment
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase

from nanovllm.checks import check_list, check_type
from nanovllm.prompts import Prompt

Conversation = Sequence[Mapping[str, Any]]
# Those of apply_chat_template that change the text.
TEXT_OPTIONS = {"tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}
PROBE, MARK = "is this text in parts", "is a part shown as it is"


def make_prompts(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation | Sequence[Conversation], options: dict[str, Any]
) -> list[Prompt]:
    """The prompts of one or a list of conversations, as text and token ids; options and errors as in `LLM.chat`."""
    check_list("messages", messages, check_type, Sequence | Mapping)
    more = check_type("chat_template_kwargs", options.pop("chat_template_kwargs", None) or {}, Mapping)
    names, options = list(options), {"add_generation_prompt": True, **options, **more}
    check_template_options(tokenizer, names, options)
    is_one = len(messages) > 0 and isinstance(messages[0], Mapping)
    conversations: Any = [messages] if is_one else messages
    texts = [render(tokenizer, f"messages[{i}]", conversation, options) for i, conversation in enumerate(conversations)]
    return [
        {"prompt": text, "prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts
    ]


def check_template_options(
    tokenizer: PreTrainedTokenizerBase, names: Iterable[str], options: Mapping[str, Any]
) -> None:
    """TypeError unless each name is one of TEXT_OPTIONS, or a variable of the chat template that `options` choose."""
    unknown = set(names) - TEXT_OPTIONS
    if unknown:
        try:
            template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
            template = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", template)  # transformers' own tags
            known = find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))
        except Exception as error:
            raise ValueError(f"the chat template is damaged: {error}") from error
        if unknown - known:
            raise TypeError(
                f"chat() got an unknown option {min(unknown - known)!r}: it is no variable of the chat template, which "
                f"has {', '.join(sorted(known))}"
            )


def render(tokenizer: PreTrainedTokenizerBase, name: str, conversation: Conversation, options: dict[str, Any]) -> str:
    """The text of a conversation, which errors call `name`.

    A template that goes through the parts of a message gets them; one that takes text gets their texts, joined by newlines.

    Raises:
        TypeError: content that is no text, no list of parts and not None.
        ValueError: a part that is no text, or a conversation that the template refuses.
    """
    conversation = [_with_content(m, partial(_check_content, f"{name}[{i}]")) for i, m in enumerate(conversation)]
    apply = partial(tokenizer.apply_chat_template, **options | {"tokenize": False})
    as_texts = [_with_content(m, _join) for m in conversation]
    if as_texts != conversation and not _takes_parts(apply, conversation):
        conversation = as_texts
    try:
        text = _apply(apply, conversation)
        text.encode()  # half a surrogate pair is no text
        return text
    except Exception as error:  # a template is a program, and raises what it likes
        raise ValueError(f"{name} is refused by the chat template: {error}") from error


def _apply(apply: Callable[[Any], str], conversation: Conversation) -> str:
    """The template's text; where it cannot take content that is None, as some add it to a text, content is empty."""
    try:
        return apply(conversation)
    except Exception:
        return apply([_with_content(m, lambda content: content or "") for m in conversation])


def _check_content(name: str, content: Any) -> Any:
    """Content as templates expect it: text, None, or a list of parts {"type": "text", "text": …}."""
    if isinstance(content, str | None):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise TypeError(f"content of {name} must be text or a list of parts, got {content!r}")
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise ValueError(f"content of {name} must have parts {{'type': 'text', 'text': ...}} alone, got {part!r}")
    return parts


def _with_content(message: Any, function: Callable[[Any], Any]) -> Any:
    """The message with what `function` makes of its content, if it has any."""
    if isinstance(message, Mapping) and "content" in message:
        return {**message, "content": function(message["content"])}
    return message


def _join(content: Any) -> Any:
    """Content as one text, parts in lines."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def _takes_parts(apply: Callable[[Any], str], conversation: Conversation) -> bool:
    """Whether the template shows the text of a part, and not the part itself."""
    probe = [{"type": "text", "text": PROBE, MARK: MARK}]
    try:
        text = apply([_with_content(m, lambda c: probe if isinstance(c, list) else c) for m in conversation])
    except Exception:
        return False
    return PROBE in text and MARK not in text

"""Converts conversations to token ids and a mask of the tokens to learn. Called by `tokenise` for format chat.

The model sees the whole conversation as the tokenizer's template renders it. The assistant's text is located by the
template's own `{% generation %}` markers, or else by rendering prefixes: it is the conversation rendered up to and
including an assistant message, minus the rendering up to it with the generation prompt. This works only if every prefix
of the conversation renders to a prefix of its text, which is checked for each conversation.
"""

import re
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from student_trainer.settings.data import SourceSettings

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
Span = tuple[int, int]


class ChatTemplate:
    """`template({"messages": [...], "tools": [...]})` gives (ids_N, counts_N); counts_N is True for tokens to learn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: SourceSettings) -> None:
        if not tokenizer.is_fast:
            raise ValueError("chat data needs a tokenizer with character offsets (a tokenizer.json); this one has none")
        self._tokenizer = tokenizer
        self._loss_on = settings.loss_on
        try:
            self._template = settings.chat_template or tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                "the tokenizer has no chat template; give `chat_template` in the source's settings, or use the "
                "tokenizer of an instruct model"
            ) from error
        self._marked = GENERATION.search(self._template) is not None

    def __call__(self, content: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """ValueError if the template refuses the conversation, or if its prefixes do not render to prefixes."""
        messages, tools = as_messages(content["messages"]), content.get("tools")
        if self._marked:
            made = self._render(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            ids_N, counts_N = np.array(made["input_ids"], np.int32), np.array(made["assistant_masks"], bool)
            if self._loss_on == "last_assistant":
                counts_N = _last_run(counts_N)
        else:
            text = self._render(messages, tools, tokenize=False)
            spans = self._assistant_spans(text, messages, tools) if self._loss_on != "all" else []
            ids_N, counts_N = self._tokenise(text, spans)
        if self._loss_on == "all":
            counts_N = np.ones(len(ids_N), bool)
        return ids_N, counts_N

    def _render(self, messages: list[dict[str, Any]], tools: Any, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, tools, chat_template=self._template, **options)
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ValueError(
                f"the chat template rejects the roles [{roles}]: {type(error).__name__}: {error}"
            ) from error

    def _assistant_spans(self, text: str, messages: list[dict[str, Any]], tools: Any) -> list[Span]:
        """Character spans of the assistant's messages in the rendered conversation."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = []
        for i in turns[-1:] if self._loss_on == "last_assistant" else turns:
            if i == 0:
                raise ValueError("the conversation begins with the assistant; expected a system or user message first")
            before = self._render(messages[:i], tools, tokenize=False, add_generation_prompt=True)
            upto = text if i == len(messages) - 1 else self._render(messages[: i + 1], tools, tokenize=False)
            if not text.startswith(upto) and self._tokenizer.eos_token:
                upto = upto.rstrip().removesuffix(self._tokenizer.eos_token)  # some templates always end with it
            if not (text.startswith(upto) and upto.startswith(before)):
                raise ValueError(
                    f"the chat template renders message {i} differently when others follow (it may drop earlier "
                    "reasoning), so the assistant's tokens can't be identified; use loss_on: last_assistant, or a "
                    "chat_template with {% generation %} around what the assistant says"
                )
            spans.append((len(before), self._trim(upto, len(before))))
        return spans

    def _trim(self, upto: str, start: int) -> int:
        """The end of the turn: right after its end-of-turn token, if the template closes it with one."""
        eos = self._tokenizer.eos_token
        found = upto.rfind(eos, start) if eos else -1
        return found + len(eos) if found >= 0 and not upto[found + len(eos) :].strip() else len(upto)

    def _tokenise(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids_N = np.array(made["input_ids"], np.int32)
        offsets_N2 = np.array(made["offset_mapping"], np.int64).reshape(-1, 2)
        counts_N = np.zeros(len(ids_N), bool)
        for start, stop in spans:
            counts_N |= (offsets_N2[:, 0] >= start) & (offsets_N2[:, 0] < stop) & (offsets_N2[:, 1] > offsets_N2[:, 0])
        return ids_N, counts_N


def as_messages(messages: Any) -> list[dict[str, Any]]:
    """A list of {"role", "content", ...}; ShareGPT's {"from", "value"} is converted. ValueError for anything else."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"expected a non-empty list of messages, got {str(messages)[:80]!r}")
    if all("from" in m and "value" in m for m in messages):
        return [{"role": SHAREGPT_ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in messages]
    for message in messages:
        if "role" not in message:
            raise ValueError(
                f"a message has the fields {sorted(message)}; expected role and content, or from and value"
            )
    return messages


def _last_run(counts_N: np.ndarray) -> np.ndarray:
    """Keep only the last run of True."""
    edges_N = np.flatnonzero(np.diff(np.concatenate([[False], counts_N, [False]])))
    last_N = np.zeros(len(counts_N), bool)
    if len(edges_N):
        last_N[edges_N[-2] : edges_N[-1]] = True
    return last_N

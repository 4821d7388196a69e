"""Loss on the assistant's tokens alone: by prefixes as by markers, against TRL's marked templates as the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl

from student_trainer.data.chat import ChatTemplate, as_messages
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.unit.data.making import opened, run, tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops what the assistant thought in all turns but the last, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "What does the still take?"},
    {"role": "assistant", "content": "A wash,\nnine per cent."},
    {"role": "user", "content": "And gives?"},
    {"role": "assistant", "content": "Spirit."},
]


def chat(**settings: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer(), SourceSettings(kind="jsonl", path="x", format="chat", **settings))


def learnt(template: ChatTemplate, messages: list[dict[str, Any]], **more: Any) -> str:
    """The text of the tokens that count."""
    ids_N, counts_N = template({"messages": messages, **more})
    assert ids_N.dtype == np.int32 and counts_N.dtype == bool and len(ids_N) == len(counts_N)
    return tokenizer().decode(ids_N[counts_N])


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", "A wash,\nnine per cent.</s>Spirit.</s>"),
        ("last_assistant", "Spirit.</s>"),
        ("all", tokenizer().apply_chat_template(TALK, chat_template=CHATML, tokenize=False)),
    ],
)
def test_what_counts_is_what_the_assistant_said_and_its_end(template: str, loss_on: str, expected: str) -> None:
    assert learnt(chat(chat_template=template, loss_on=loss_on), TALK) == expected


def test_prefixes_and_markers_agree_token_by_token() -> None:
    for messages in (TALK, [{"role": "system", "content": "Be brief."}, *TALK], TALK[:2], TALK + TALK, TALK[:3]):
        by_prefix, by_mark = chat(chat_template=CHATML), chat(chat_template=MARKED)
        for a, b in zip(by_prefix({"messages": messages}), by_mark({"messages": messages}), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "family",
    ["cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen3_instruct_2507"],
)
def test_prefixes_agree_with_the_marked_templates_of_trl(family: str) -> None:
    plain = learnt(chat(chat_template=(TEMPLATES / f"{family}.jinja").read_text()), TALK)
    assert plain == learnt(chat(chat_template=(TEMPLATES / f"{family}_training.jinja").read_text()), TALK)
    assert "nine per cent." in plain and "Spirit." in plain and "still" not in plain and "gives" not in plain


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "gptoss", "nemotron_3_nano", "deepseekv3"])
def test_templates_that_render_earlier_turns_otherwise_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="renders message 1 differently when others follow"):
        learnt(chat(chat_template=(TEMPLATES / f"{family}.jinja").read_text()), TALK)


def test_a_template_that_rewrites_the_past_is_refused_or_learnt_in_its_last_turn() -> None:
    messages = [TALK[0], {"role": "assistant", "content": "hm</think>A wash."}, *TALK[2:]]
    with pytest.raises(ValueError, match="renders message 1 differently when others follow"):
        learnt(chat(chat_template=FORGETFUL), messages)
    assert learnt(chat(chat_template=FORGETFUL, loss_on="last_assistant"), messages) == "Spirit.</s>"


def test_tools_reach_the_template() -> None:
    template = (TEMPLATES / "qwen2_5.jinja").read_text()
    tools = [{"type": "function", "function": {"name": "weigh", "parameters": {}}}]
    calls = [{"type": "function", "function": {"name": "weigh", "arguments": {"x": 1}}}]
    messages = [TALK[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    made = chat(chat_template=template)
    ids_N, _ = made({"messages": messages, "tools": tools})
    assert '"name": "weigh", "parameters"' in tokenizer().decode(ids_N)
    assert '{"name": "weigh", "arguments": {"x": 1}}' in learnt(made, messages, tools=tools)


def test_sharegpt_is_understood() -> None:
    talk = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert as_messages(talk) == [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list of messages"),
        ("hello", "non-empty list of messages"),
        ([{"text": "x"}], "expected role and content"),
        ([{"role": "assistant", "content": "I begin"}], "begins with the assistant"),
        ([{"role": "user"}], r"the chat template rejects the roles \[user\]"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        learnt(chat(chat_template=CHATML), messages)


def test_a_tokenizer_without_a_template_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="no chat template; give `chat_template`"):
        chat()


def written(tmp_path: Path, talks: list[Any], **settings: Any) -> DataSettings:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    shape = {"kind": "jsonl", "path": str(path), "format": "chat", "chat_template": CHATML, "held_out_fraction": 0}
    source = SourceSettings(**{**shape, **settings})
    return DataSettings(sources={"talk": source}, seq_len=48, rows=2, cache_folder=str(tmp_path / "cache"))


def test_rows_are_learnt_where_the_next_token_is_the_assistants(tmp_path: Path) -> None:
    with opened(written(tmp_path, [TALK, TALK[:2]])) as source:
        batches, _ = run(source, 4)
    said = []
    for batch in batches:
        rows, places = np.nonzero(batch.loss_mask_BT)
        assert (batch.document_ids_BT[rows, places] == batch.document_ids_BT[rows, places + 1]).all()
        said.append(tokenizer().decode(batch.tokens_BT[rows, places + 1]))
    text = "".join(said)
    assert "wash" in text and "Spirit" in text
    assert "What" not in text and "im_start" not in text and "user" not in text


def test_a_bad_conversation_stops_the_run_with_its_name_or_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talks = [TALK, [{"role": "user", "content": "alone"}], TALK[:2]]
    with (
        opened(written(tmp_path, talks)) as source,
        pytest.raises(ValueError, match="source 'talk', document 1: the conversation has no tokens to learn"),
    ):
        run(source, 1)
    with opened(written(tmp_path, talks, bad_documents="skip")) as source:
        batches, _ = run(source, 3)
        assert source.skipped["talk"] >= 1
    assert "document 1" in caplog.text and "Skipping it" in caplog.text
    assert all(d.key.split(":")[1] in ("0", "2") for b in batches for d in b.documents)

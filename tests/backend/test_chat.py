"""Chat messages: checked, then rendered with the model's template."""

from __future__ import annotations

import json
from datetime import datetime

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_tokenizers import smollm2_file

from dspark_backend.chat import ChatTemplate, parse_messages
from dspark_backend.errors import ArtifactError, InvalidRequest

SIMPLE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = '[{"role": "user", "content": "Hi"}]'


def test_render() -> None:
    template = ChatTemplate(SIMPLE, "<s>", "</s>")
    assert template.render(USER) == "<s><user>Hi</s><assistant>"
    assert template.render(USER, add_generation_prompt=False) == "<s><user>Hi</s>"


def test_missing_special_tokens_render_as_nothing() -> None:
    assert ChatTemplate(SIMPLE).render(USER) == "<user>Hi<assistant>"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert parse_messages(json.dumps([{"role": "user", "content": parts}])) == [{"role": "user", "content": "one\ntwo"}]


def test_tool_calls() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": "2"},
    ]
    first, second = parse_messages(json.dumps(messages))
    assert "content" not in first
    assert first["tool_calls"][0]["function"]["arguments"] == {"x": [1]}
    assert second == messages[1]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("", "malformed JSON"),
        ("[", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ("{}", "expected a JSON list of messages, got an object"),
        ('"hi"', "expected a JSON list of messages, got a string"),
        ("null", "expected a JSON list of messages, got null"),
        ("7", "expected a JSON list of messages, got a number"),
        ("[]", "at least one message"),
        ("[1]", r"messages\[0\]: expected an object with role and content, got a number"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "text": "b"}]', r"messages\[1\]: unknown key 'text'"),
        ('[{"content": "a"}]', r"messages\[0\]: expected a role"),
        ('[{"role": "", "content": "a"}]', r"messages\[0\]: expected a role"),
        ('[{"role": null, "content": "a"}]', r"messages\[0\]: expected a role"),
        ('[{"role": 1, "content": "a"}]', r"messages\[0\]\.role: expected a string, got a number"),
        ('[{"role": "user", "name": true, "content": "a"}]', r"\.name: expected a string, got a boolean"),
        ('[{"role": "user"}]', r"messages\[0\]: expected content, got none"),
        ('[{"role": "user", "content": null}]', r"messages\[0\]: expected content, got none"),
        ('[{"role": "assistant", "tool_calls": []}]', r"messages\[0\]: expected content, got none"),
        ('[{"role": "user", "content": 1}]', r"content: expected a string or a list of text parts, got a number"),
        ('[{"role": "user", "content": {"text": "a"}}]', r"content: expected a string or a list of text parts"),
        ('[{"role": "user", "content": ["a"]}]', r'content\[0\]: expected \{"type": "text"'),
        ('[{"role": "user", "content": [{"type": "image", "url": "x"}]}]', r"content\[0\]: expected .* got .*image"),
        ('[{"role": "user", "content": [{"type": "text", "text": 1}]}]', r"content\[0\]\.text: expected a string"),
        ('[{"role": "assistant", "tool_calls": {}}]', r"tool_calls: expected a list of objects, got an object"),
        ('[{"role": "assistant", "tool_calls": [1]}]', r"tool_calls\[0\]: expected an object, got a number"),
        (
            '[{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]',
            r"tool_calls\[0\]: expected arguments as JSON",
        ),
        (r'[{"role": "user", "content": "\ud800"}]', "unpaired surrogate"),
        ('[{"role": "user", "content": "\ud800"}]', "unpaired surrogate"),
    ],
)
def test_bad_messages(messages: str, error: str) -> None:
    with pytest.raises(InvalidRequest, match=error):
        ChatTemplate(SIMPLE).render(messages)


def test_the_templates_own_message_reaches_the_client() -> None:
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('Start with a system message!') }}{% endif %}"
    with pytest.raises(InvalidRequest, match="Start with a system message!"):
        ChatTemplate(source).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' + messages }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
    ],
)
def test_templates_that_fail_refuse_the_request(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refused them"):
        ChatTemplate(source).render(USER)


def test_no_template() -> None:
    with pytest.raises(InvalidRequest, match="has no chat template; send the prompt as text_input"):
        ChatTemplate(None).render(USER)


def test_syntax_error_is_found_at_load() -> None:
    with pytest.raises(ArtifactError, match="does not compile"):
        ChatTemplate("{% if %}")


@given(
    st.text(st.characters(codec="utf-8")) | st.sampled_from(["{{ 7 * 7 }}", "{% for x in y %}", "{# no #}", "<&>'\""])
)
def test_messages_are_only_data(content: str) -> None:
    message = json.dumps([{"role": "user", "content": content}])
    assert ChatTemplate("{{ messages[0].content }}").render(message) == content


def test_what_hugging_face_templates_rely_on() -> None:
    source = """
    {%- for m in messages %}
        {%- if loop.index0 == 1 %}{% break %}{% endif %}
        {% if true %}
    {%- generation %}{{ m | tojson }}{% endgeneration %}
        {% endif %}
    {%- endfor -%}
    |{{ {'a': '<é>'} | tojson(indent=1) }}|{{ strftime_now('%Y') }}|{{ tools is none }}"""
    got = ChatTemplate(source).render('[{"role": "user", "content": "<é&>"}, {"role": "user", "content": "b"}]')
    assert got == ('{"role": "user", "content": "<é&>"}|{\n "a": "<é>"\n}|' + f"{datetime.now():%Y}|True")


@pytest.mark.slow
def test_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    path = smollm2_file()
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    source = gguf.GGUFReader(path).get_field("tokenizer.chat_template").contents()
    template = ChatTemplate(source, "<|im_start|>", "<|im_end|>")
    chats = [
        [{"role": "user", "content": "Hi <|im_end|> 日本\n\n"}],
        [{"role": "system", "content": "Be <brief> & 'exact'."}, {"role": "user", "content": "{{ 1 }}"}],
        [{"role": role, "content": str(n)} for n, role in enumerate(["user", "assistant"] * 3)],
    ]
    for chat in chats:
        for prompt in (True, False):
            expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert template.render(json.dumps(chat), prompt) == expected

"""Conversations as token ids, with a checkpoint's template and without. Covers blinkimp/cli/chat_template.py.

Run: pytest tests/null/test_chat_template.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from blinkimp.cli.chat_template import ChatTemplateError, Conversation, MessageTooLongError
from blinkimp.config import Config, model_folder
from blinkimp.nic_shim.chat_template import ChatTemplate

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def checkpoint(folder: Path, settings: dict[str, object] | None = None, jinja: str | None = None) -> Path:
    """A folder with the embedded model's tokenizer and the given settings."""
    shutil.copy(model_folder(Config()) / "tokenizer.json", folder)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def text_of(conversation: Conversation) -> str:
    return str(conversation.tokenizer.hf.decode(conversation.prompt_ids(), skip_special_tokens=False))


def test_without_a_template_the_prompt_is_plain_paragraphs(tmp_path: Path) -> None:
    conversation = Conversation(checkpoint(tmp_path), system="Be brief.")
    conversation.add("user", "Hello")
    assert conversation.is_plain
    assert text_of(conversation).endswith("System: Be brief.\n\nUser: Hello\n\nAssistant:")


@pytest.mark.parametrize("place", ["text", "list", "file"])
def test_the_template_is_found_wherever_checkpoints_keep_it(tmp_path: Path, place: str) -> None:
    match place:
        case "text":
            folder = checkpoint(tmp_path, {"chat_template": TEMPLATE, "bos_token": {"content": "[B]"}})
        case "list":
            templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]
            folder = checkpoint(tmp_path, {"chat_template": templates, "bos_token": "[B]"})
        case _:
            folder = checkpoint(tmp_path, {"bos_token": "[B]"}, TEMPLATE)
    conversation = Conversation(folder, system="S")
    conversation.add("user", " Hi ")
    assert not conversation.is_plain
    assert text_of(conversation) == "[B]<system>S\n<user>Hi\n<assistant>"


def test_the_oldest_exchanges_are_forgotten_first_and_the_system_message_never(tmp_path: Path) -> None:
    conversation = Conversation(checkpoint(tmp_path, jinja=TEMPLATE), system="S")
    for turn_idx in range(20):
        conversation.add("user", f"question {turn_idx} of many words")
        conversation.add("assistant", f"answer {turn_idx}")
    conversation.add("user", "the last one")
    num_messages = len(conversation.messages)
    num_forgotten = conversation.fit(100)
    assert num_forgotten > 0
    assert len(conversation.messages) == num_messages - num_forgotten
    assert len(conversation.prompt_ids()) <= 100
    assert conversation.messages[0] == {"role": "system", "content": "S"}
    assert conversation.messages[1]["role"] == "user"
    assert conversation.messages[-1]["content"] == "the last one"
    assert conversation.fit(100) == 0


@pytest.mark.parametrize("system", ["", "S"])
@pytest.mark.parametrize("num_turns", [0, 1, 3])
def test_nothing_is_forgotten_for_a_message_that_does_not_fit_anyway(
    tmp_path: Path, system: str, num_turns: int
) -> None:
    conversation = Conversation(checkpoint(tmp_path, jinja=TEMPLATE), system)
    for turn_idx in range(num_turns):
        conversation.add("user", f"question {turn_idx}")
        conversation.add("assistant", "answer")
    before = list(conversation.messages)
    conversation.add("user", "many words " * 50)
    with pytest.raises(
        MessageTooLongError, match=r"too long: got a prompt of \d+ tokens .*, expected at most 40; shorten it"
    ):
        conversation.fit(40)
    conversation.drop_last()
    assert conversation.messages == before
    conversation.add("user", "few")
    assert conversation.fit(10**6) == 0


def test_a_template_that_refuses_is_an_error_for_the_user(tmp_path: Path) -> None:
    conversation = Conversation(checkpoint(tmp_path, jinja="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        conversation.prompt_ids()


@pytest.mark.parametrize(
    ("template", "got"),
    [
        (5, "got 5, expected a template as text"),
        ({"default": TEMPLATE}, r"got \{'default': .*, expected a template as text"),
        ([{"name": "tools", "template": TEMPLATE}], r"got a list of 1 \('tools'\), whose `default` is none, expected"),
        ([{"name": "default", "template": 5}], r"got a list of 1 \('default'\), whose `default` is none, expected"),
        ([{"name": "default", "template": None}], "got a list of 1"),
        ([TEMPLATE], "got a list of 1"),
        ([], "got a list of 0"),
    ],
)
def test_a_template_that_cannot_be_one_is_an_error(tmp_path: Path, template: object, got: str) -> None:
    with pytest.raises(ChatTemplateError, match=rf"{tmp_path}/tokenizer_config.json: chat_template: {got}"):
        ChatTemplate(checkpoint(tmp_path, {"chat_template": template}))


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_file_that_is_not_utf8_is_told_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ChatTemplateError, match=rf"{tmp_path}/{name} cannot be read: .*; fetch the file again"):
        ChatTemplate(tmp_path)


def test_settings_that_are_no_object_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ChatTemplateError, match=r"tokenizer_config.json: got \[1\], expected a JSON object"):
        ChatTemplate(tmp_path)


def test_no_template_at_all_is_plain(tmp_path: Path) -> None:
    assert ChatTemplate(checkpoint(tmp_path, {"chat_template": None})).is_plain


def test_a_conversation_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    conversation = Conversation(checkpoint(tmp_path, jinja=TEMPLATE))
    conversation.add("user", "a\ud800")
    with pytest.raises(ChatTemplateError, match="half a surrogate pair; expected UTF-8"):
        conversation.prompt_ids()


def test_a_broken_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match="expected a Jinja template"):
        Conversation(checkpoint(tmp_path, jinja="{% for %}"))


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    source = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    conversation = Conversation(checkpoint(tmp_path, jinja=source))
    conversation.add("user", "x")
    with pytest.raises(ChatTemplateError, match="unsafe"):
        conversation.prompt_ids()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "longer than 1 s"),
        (
            "{% macro f(n) %}{{ f(n-1) if n else '' }}{{ f(n-1) if n else '' }}{% endmacro %}{{ f(40) }}",
            "longer than 1 s",
        ),
        ("{{ 'x' * 100000000000 }}", "longer than"),
        ("{{ 9 ** 9999999 }}", "exponent"),
        ("{{ '%1000000000d' % 3 }}", "not supported"),
        ("{{ '{:1000000000d}'.format(3) }}", "not supported"),
        ("{{ 'x' | center(1000000000) }}", "longer than"),
        ("{{ 'x'.ljust(10000000000) }}", "longer than"),
        (
            "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "longer than",
        ),
        (
            "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
            "longer than",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
            "longer than",
        ),
        ("{{ [1, 2] | tojson(separators=('x' * 100, ':')) }}", "separator"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_hostile_template_is_stopped(tmp_path: Path, template: str, words: str) -> None:
    conversation = Conversation(checkpoint(tmp_path, jinja=template))
    conversation.add("user", "x")
    with pytest.raises(ChatTemplateError, match=words):
        conversation.prompt_ids()


def test_what_honest_templates_use_still_works(tmp_path: Path) -> None:
    template = (
        "{{ 'ab' | center(4) }}|{{ ['a', 'b'] | join(', ') }}|{{ 'abc'.replace('b', 'x') }}|{{ 'a' ~ 1 ~ 'b' }}|{{ {'a': 1} | tojson }}|"
        "{{ messages[0].content.split(' ')[-1] }}|{{ 'a\nb' | indent(2) }}|{% for m in messages if m.role == 'user' %}{{ loop.index }}{% endfor %}"
    )
    conversation = Conversation(checkpoint(tmp_path, jinja=template))
    conversation.add("user", "x y")
    assert text_of(conversation) == ' ab |a, b|axc|a1b|{"a": 1}|y|a\n  b|1'


AS_TRANSFORMERS = {  # a template, what it says; one system message, one user message
    "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}.": ".",
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools is none }}": "True",
    "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}": '{"content":"S é<","role":"system"}',
    "{{ {'b': 'é', 'a': 1} | tojson(true) }}": '{"b": "\\u00e9", "a": 1}',
    "{% set x = 1 %}{% generation %}{% set x = 2 %}<{{ x }}>{% endgeneration %}{{ x }}": "<2>1",
    "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% if loop.first %}{% continue %}{% endif %}.{% endfor %}": "systemuser.",
}


@pytest.mark.parametrize("template", AS_TRANSFORMERS)
def test_a_template_says_what_it_says_in_transformers(tmp_path: Path, template: str) -> None:
    messages = [{"role": "system", "content": "S é<"}, {"role": "user", "content": "U"}]
    assert ChatTemplate(checkpoint(tmp_path, jinja=template)).text(messages) == AS_TRANSFORMERS[template]
    reference = pytest.importorskip("transformers.utils.chat_template_utils", reason="it is the reference")
    theirs = reference.render_jinja_template([messages], chat_template=template, add_generation_prompt=True)[0]
    assert theirs == [AS_TRANSFORMERS[template]]


def test_variables_of_the_request_reach_the_template(tmp_path: Path) -> None:
    template = ChatTemplate(checkpoint(tmp_path, jinja="{{ tools }}{{ enable_thinking }}"))
    assert template.text([], tools=[1], enable_thinking=False) == "[1]False"

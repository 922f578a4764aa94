"""A conversation as a prompt: by the checkpoint's own chat template, or as plain tagged paragraphs where it has none.

Called by nic_shim/http_app.py and blinkimp/cli/chat_template.py. Test: pytest tests/null/test_chat_template.py

Hazard: templates come with the weights, from anyone, and run for each request. So they get Jinja's immutable sandbox, which keeps them
from Python's objects, and three limits: a deadline that every turn of a loop and every macro call looks at, a bound on every text that
is made, and a bound on exponents. What exceeds one is a ChatTemplateError.
"""

from __future__ import annotations

import contextvars
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from blinkimp.complaints import quote
from blinkimp.nic_shim.tokenizer import Tokenizer, chat_prompt

MAX_TEMPLATE_CHARS: Final = 1 << 20
MAX_TEXT_CHARS: Final = 4 << 20
MAX_EXPONENT: Final = 64
MAX_RENDER_S: Final = 1.0  # of CPU time: whether a template is refused does not depend on who else computes
NOT_GIVEN: Final = {"tools": None, "documents": None}  # as transformers has it: templates ask whether they are none
MAX_SEPARATOR_CHARS: Final = 16
SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "pad_token", "unk_token")

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline")


class ChatTemplateError(RuntimeError):
    """The checkpoint's chat template cannot be used, or not for this conversation."""


class ChatTemplate:
    """The template of one checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        settings = _read_settings(folder)
        self._special = {name: _content(settings.get(name)) for name in SPECIAL_TOKENS}
        source = _template_source(folder, settings)
        self._template = None
        if source is None:
            return
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(
                f"{folder}: the chat template has {len(source)} characters, expected at most {MAX_TEMPLATE_CHARS}; fetch the file again"
            )
        try:
            self._template = _Environment().from_string(source)
        except (TemplateError, RecursionError) as error:
            raise ChatTemplateError(
                f"{folder}: chat template: {error}; expected a Jinja template; fetch the file again"
            ) from error

    @property
    def is_plain(self) -> bool:
        """No template: the reply ends where the model begins to speak for the user."""
        return self._template is None

    def text(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt's text, with the special tokens where there is a template."""
        if self._template is None:
            try:
                return chat_prompt(messages, add_generation_prompt=add_generation_prompt)
            except ValueError as error:
                raise ChatTemplateError(str(error)) from None
        token = _deadline.set(time.thread_time() + MAX_RENDER_S)
        try:
            pieces, num_chars = [], 0
            values = {**NOT_GIVEN, **variables, **self._special}
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **values
            ):
                num_chars += len(piece)
                if num_chars > MAX_TEXT_CHARS:
                    raise TemplateError(f"the text is longer than {MAX_TEXT_CHARS} characters")
                pieces.append(piece)
            return "".join(pieces)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template may raise anything: TypeError, KeyError, RecursionError, OverflowError
            raise ChatTemplateError(
                f"the chat template refused the conversation: {error}; correct the messages' roles and order"
            ) from error
        finally:
            _deadline.reset(token)

    def prompt_ids(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids that end where the assistant's reply begins."""
        text = self.text(messages, **variables)
        # A template writes the special tokens itself. encode_batch releases the GIL.
        try:
            encoding = tokenizer.hf.encode_batch([text], add_special_tokens=self.is_plain)[0]
        except TypeError:  # so says the binding of half a surrogate pair
            raise ChatTemplateError(
                "the conversation as text holds half a surrogate pair; expected UTF-8; correct the messages, or the template"
            ) from None
        return list(encoding.ids)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: time.strftime(str(form))
        self.globals[_CHECK] = _check_deadline
        self.globals[_JOIN] = _join
        self.filters["tojson"] = _to_json
        for name in ("center", "indent", "wordwrap", "join", "replace", "batch", "slice"):
            self.filters[name] = _bounded(self.filters[name], is_async=name in ("join", "slice"))
        for name in ("format", "pprint"):
            self.filters[name] = _refused(name)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Jinja's parser, a look at the clock in each loop and macro body, and a bounded `~`."""
        template = super()._parse(source, name, filename)
        for node in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
            check = nodes.Call(nodes.Name(_CHECK, "load"), [], [], None, None)
            node.body.insert(0, nodes.Output([check], lineno=node.lineno))
        _BoundedConcat().visit(template)
        template.set_environment(self)
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int | float) and abs(right) > MAX_EXPONENT:
            raise TemplateError(f"exponent {right} is above {MAX_EXPONENT}")
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    _check_size(len(sequence) * times)
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            raise TemplateError("% of text is not supported: it can fill memory")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *arguments: Any, **keywords: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            _check_call(owner, arguments, keywords)
        return super().call(context, function, *arguments, **keywords)

    def wrap_str_format(self, value: Any) -> Any:
        return _refused("format") if getattr(value, "__name__", "") in ("format", "format_map") else None


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; the text is what stands in it."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _BoundedConcat(NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  (jinja2 names its visitors so)
        self.generic_visit(node)
        return nodes.Call(nodes.Name(_JOIN, "load"), node.nodes, [], None, None, lineno=node.lineno)


_CHECK: Final = "_blinkimp_check_deadline"
_JOIN: Final = "_blinkimp_join"


def _join(*values: Any) -> str:
    pieces = [str(value) for value in values]
    _check_size(sum(map(len, pieces)))
    return "".join(pieces)


def _check_call(owner: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """A method of a text: neither a width nor a replacement may blow it up."""
    for argument in (*arguments, *keywords.values()):
        if isinstance(argument, int):
            _check_size(argument)
        elif isinstance(argument, str | list | tuple):
            _check_size(max(1, len(owner)) * max(1, len(argument)) // 16)


def _refused(name: str) -> Any:
    def refuse(*_arguments: Any, **_keywords: Any) -> Any:
        raise TemplateError(f"{name} is not supported: it can fill memory")

    return refuse


def _check_deadline() -> str:
    if time.thread_time() > _deadline.get():
        raise TemplateError(f"it takes longer than {MAX_RENDER_S:g} s")
    return ""


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_TEXT_CHARS:
        raise TemplateError(f"the text is longer than {MAX_TEXT_CHARS} characters")


def _bounded(filter_function: Any, *, is_async: bool) -> Any:
    """A filter whose arguments may not blow its text up."""
    function = getattr(filter_function, "__wrapped__", filter_function) if is_async else filter_function
    marks = vars(function)  # jinja marks filters that want the environment or the context as their first argument
    num_own = 1 if any(mark.startswith("jinja_pass_arg") for mark in marks) else 0

    def bounded(*arguments: Any, **keywords: Any) -> Any:
        value = arguments[num_own] if len(arguments) > num_own else None
        owner = value if isinstance(value, str) else " " * (len(value) if isinstance(value, list | tuple) else 1)
        _check_call(owner, arguments[num_own + 1 :], keywords)
        return function(*arguments, **keywords)

    bounded.__dict__.update({mark: marks[mark] for mark in marks if mark.startswith("jinja_pass_arg")})
    return bounded


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: without HTML escapes."""
    if indent is not None and indent > 64:
        raise TemplateError(f"indent {indent} is above 64")
    if separators is not None and max(map(len, separators)) > MAX_SEPARATOR_CHARS:
        raise TemplateError(f"a separator has more than {MAX_SEPARATOR_CHARS} characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"{path} cannot be read: {error}; expected JSON; fetch the file again") from error
    if not isinstance(settings, dict):
        raise ChatTemplateError(f"{path}: got {quote(settings)}, expected a JSON object; fetch the file again")
    return settings


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    """None: the checkpoint has none. What is there and cannot be one is an error: without it the model would be asked in other words."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ChatTemplateError(
                f"{path} cannot be read: {error}; expected a Jinja template in UTF-8; fetch the file again"
            ) from error
    given = template = settings.get("chat_template")
    if isinstance(given, list):  # several by name
        named = {str(entry.get("name")): entry.get("template") for entry in given if isinstance(entry, dict)}
        template = named.get("default")
    if given is not None and not isinstance(template, str):
        raise ChatTemplateError(
            f"{folder / 'tokenizer_config.json'}: chat_template: got {_described(given)}, expected a template as text, or a list of named "
            "ones with `default` among them; correct the file, or put the template into chat_template.jinja beside it"
        )
    return template


def _described(given: Any) -> str:
    if not isinstance(given, list):
        return quote(given)
    names = ", ".join(quote(entry.get("name") if isinstance(entry, dict) else entry) for entry in given)
    return f"a list of {len(given)} ({names}), whose `default` is none"


def _content(token: Any) -> str:
    """A special token's text; some checkpoints wrap it in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _raise_exception(message: str) -> None:
    raise TemplateError(message)

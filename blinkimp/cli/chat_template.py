"""A conversation as token ids: by the checkpoint's own chat template, or as plain tagged paragraphs where it has none.

Called by blinkimp/cli/chat.py. Test: pytest tests/null/test_chat_template.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from blinkimp.nic_shim.tokenizer import Tokenizer, chat_prompt

Message = dict[str, str]  # role: system, user or assistant; content


class ChatTemplateError(RuntimeError):
    """The checkpoint's chat template cannot be used."""


class Conversation:
    """The messages so far, and the prompt that asks for the next reply."""

    def __init__(self, folder: Path, system: str = "") -> None:
        self.tokenizer = Tokenizer(folder)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._settings = _read_settings(folder)
        source = _template_source(folder, self._settings)
        self._template = None
        if source is not None:
            # Templates come with the weights, from anyone: the sandbox keeps them from Python's objects.
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            environment.globals["raise_exception"] = _raise_exception
            try:
                self._template = environment.from_string(source)
            except TemplateError as error:
                raise ChatTemplateError(
                    f"{folder}: chat template: {error}; expected a Jinja template; fetch the file again"
                ) from error

    @property
    def is_plain(self) -> bool:
        """No template: the reply ends where the model begins to speak for the user."""
        return self._template is None

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def prompt_ids(self) -> list[int]:
        """Token ids that end where the assistant's reply begins."""
        if self._template is None:
            return [int(token) for token in self.tokenizer.encode(chat_prompt(self.messages))]
        special = {
            name: _content(self._settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        try:
            text = self._template.render(messages=self.messages, add_generation_prompt=True, **special)
        except TemplateError as error:
            raise ChatTemplateError(
                f"the chat template refused the conversation: {error}; leave out --system, or start anew"
            ) from error
        # The template writes the special tokens itself.
        return list(self.tokenizer.hf.encode(text, add_special_tokens=False).ids)

    def fit(self, max_prompt_tokens: int) -> int:
        """Forgets the oldest exchanges until the prompt fits; returns how many messages were forgotten."""
        num_forgotten = 0
        first = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        while len(self.messages) > first + 1 and len(self.prompt_ids()) > max_prompt_tokens:
            del self.messages[first : first + 2]
            num_forgotten += 2
        return num_forgotten


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ChatTemplateError(f"{path} cannot be read: {error}; expected JSON; fetch the file again") from error
    return settings if isinstance(settings, dict) else {}


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: Any) -> str:
    """A special token's text; some checkpoints wrap it in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _raise_exception(message: str) -> None:
    raise TemplateError(message)

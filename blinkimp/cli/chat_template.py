"""The conversation of `blinkimp chat` as token ids, by the checkpoint's chat template.

Called by blinkimp/cli/chat.py. Test: pytest tests/null/test_chat_template.py
"""

from __future__ import annotations

from pathlib import Path

from blinkimp.nic_shim.chat_template import ChatTemplate, ChatTemplateError
from blinkimp.nic_shim.tokenizer import Tokenizer

__all__ = ["ChatTemplateError", "Conversation", "MessageTooLongError"]

Message = dict[str, str]  # role: system, user or assistant; content


class MessageTooLongError(RuntimeError):
    """It cannot be answered, whatever is forgotten."""


class Conversation:
    """The messages so far, and the prompt that asks for the next reply."""

    def __init__(self, folder: Path, system: str = "") -> None:
        self.tokenizer = Tokenizer(folder)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._template = ChatTemplate(folder)

    @property
    def is_plain(self) -> bool:
        """No template: the reply ends where the model begins to speak for the user."""
        return self._template.is_plain

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def prompt_ids(self) -> list[int]:
        """Token ids that end where the assistant's reply begins."""
        return self._template.prompt_ids(self.tokenizer, self.messages)

    def fit(self, max_prompt_tokens: int) -> int:
        """Forgets the oldest exchanges until the prompt fits; returns how many messages were forgotten. Raises MessageTooLongError, and
        forgets nothing, where the last message does not even fit alone."""
        num_forgotten = 0
        first = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        while (num_tokens := len(self._ids_without(first, num_forgotten))) > max_prompt_tokens:
            num_forgotten += 2
            if first + num_forgotten >= len(self.messages):
                raise MessageTooLongError(
                    f"the message is too long: got a prompt of {num_tokens} tokens even without the exchanges before it, expected at "
                    f"most {max(0, max_prompt_tokens)}; shorten it, or lower --max-tokens"
                )
        del self.messages[first : first + num_forgotten]
        return num_forgotten

    def drop_last(self) -> None:
        """The message that was added last could not be answered."""
        self.messages.pop()

    def _ids_without(self, first: int, num_forgotten: int) -> list[int]:
        return self._template.prompt_ids(
            self.tokenizer, [*self.messages[:first], *self.messages[first + num_forgotten :]]
        )

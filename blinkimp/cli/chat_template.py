"""The conversation of `blinkimp chat` as token ids, by the checkpoint's chat template.

Called by blinkimp/cli/chat.py. Test: pytest tests/null/test_chat_template.py
"""

from __future__ import annotations

from pathlib import Path

from blinkimp.nic_shim.chat_template import ChatTemplate, ChatTemplateError
from blinkimp.nic_shim.tokenizer import Tokenizer

__all__ = ["ChatTemplateError", "Conversation"]

Message = dict[str, str]  # role: system, user or assistant; content


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
        """Forgets the oldest exchanges until the prompt fits; returns how many messages were forgotten."""
        num_forgotten = 0
        first = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        while len(self.messages) > first + 1 and len(self.prompt_ids()) > max_prompt_tokens:
            del self.messages[first : first + 2]
            num_forgotten += 2
        return num_forgotten

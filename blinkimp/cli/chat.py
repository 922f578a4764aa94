"""`blinkimp chat`: a conversation in the terminal.

Called by blinkimp/cli/__init__.py. Test: pytest tests/host/test_cli.py
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rich.text import Text

from blinkimp.cli.client_keys import security_of
from blinkimp.cli.local_server import add_server_flags, server_for
from blinkimp.cli.options import add_sampling_flags, config_of, new_parser, sampling_of
from blinkimp.cli.terminal import stderr_console
from blinkimp.cli.user_text import NotUtf8Error, checked, hide_bad_bytes
from blinkimp.config import model_folder

if TYPE_CHECKING:
    from blinkimp.cli.chat_template import Conversation
    from blinkimp.client import Client

EPILOG = """\
examples:
  blinkimp chat --model ~/models/Qwen3-4B
  blinkimp chat --model ~/models/Qwen3-4B --system 'Answer in one sentence.' --temperature 0.7
  blinkimp chat --model ~/models/Qwen3-4B --connect tcp://127.0.0.1:5555

what happens: the conversation is written in the checkpoint's own chat template and sent as token ids; the reply streams back. With
--connect, --model must be the folder that the server serves. The oldest exchanges are forgotten when the context is full; a message that
does not fit even then, or that the server refuses, is dropped, and the conversation goes on.
Ctrl-C stops a reply, Ctrl-D ends. The embedded model completes code; it was not trained to converse.
"""


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(subparsers, "chat", summary, EPILOG, usage="[options]")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    add_sampling_flags(parser, max_tokens=512)
    add_server_flags(parser)


def run(options: argparse.Namespace) -> int:
    from blinkimp.cli.chat_template import ChatTemplateError, Conversation, MessageTooLongError
    from blinkimp.client import Client, RequestRefusedError
    from blinkimp.nic_shim.tokenizer import USER_SPEAKS

    hide_bad_bytes()
    checked("--system", options.system)
    folder = model_folder(config_of(options))
    conversation = Conversation(folder, options.system)
    if conversation.is_plain:
        stderr_console.print(
            Text(f"{folder} has no chat template: plain `User:` and `Assistant:` paragraphs are used", style="yellow"),
            soft_wrap=True,
        )
    security = security_of(options)
    with server_for(options) as endpoint, Client(endpoint, timeout_s=options.timeout, security=security) as client:
        max_context = check_same_model(client, conversation)
        sampling = sampling_of(options)
        if conversation.is_plain:  # the model may go on to speak for the user
            sampling["stop"] = [USER_SPEAKS]
        while (line := read_line()) is not None:
            if not line.strip():
                continue
            conversation.add("user", line)
            try:
                checked("the message", line)
                if num_forgotten := conversation.fit(max_context - options.max_tokens):
                    stderr_console.print(
                        f"[dim]the context is full: the oldest {num_forgotten} messages are forgotten[/]"
                    )
                reply = stream_reply(client, conversation, sampling)
            except (NotUtf8Error, MessageTooLongError, ChatTemplateError, RequestRefusedError) as error:
                conversation.drop_last()
                say_dropped(error)
                continue
            conversation.add("assistant", reply)
    return 0


def say_dropped(reason: Exception) -> None:
    """The conversation goes on as if the message had not been."""
    stderr_console.print(Text(f"{reason}. The message was dropped", style="yellow"), soft_wrap=True)


class WrongModelError(RuntimeError):
    """The conversation is tokenised for another model than the server's."""


def check_same_model(client: Client, conversation: Conversation) -> int:
    """The server's max_context. Raises WrongModelError when its vocabulary cannot be this tokenizer's."""
    health = client.health()
    if conversation.tokenizer.vocab_size > health.vocab_size:
        raise WrongModelError(
            f"{conversation.tokenizer.path} has {conversation.tokenizer.vocab_size} tokens, the server's model {health.vocab_size}; "
            "give --model the folder that the server serves"
        )
    return health.max_context


def read_line() -> str | None:
    """The user's next message; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def stream_reply(client: Client, conversation: Conversation, sampling: dict[str, Any]) -> str:
    """Prints the reply as it comes; Ctrl-C ends it early. Returns its text."""
    text = ""
    with client.submit(conversation.prompt_ids(), **sampling) as stream:
        try:
            for piece in stream.text_pieces():
                text += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass
    sys.stdout.write("\n")
    sys.stdout.flush()
    return text.strip()

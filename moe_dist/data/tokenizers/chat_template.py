"""The chat template of a tokenizer: it writes a conversation as one text, and encodes this text as ids.

A Hugging Face folder holds the template in chat_template.jinja, or as `chat_template` in tokenizer_config.json or
chat_template.json. It is rendered as transformers does: in Jinja's sandbox, with the names of the special tokens, the
filter `tojson` and the functions raise_exception and strftime_now. The function strftime_now always gives the same
day, so that the ids of a conversation do not depend on the day on which they are made.

Special tokens that the template writes are encoded as their ids. If a message contains the text of a special token,
this text is encoded like any other text: the BEGIN and END markers are put around it before the message is rendered,
and are removed before it is encoded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_dist.core.errors import UserError, cut
from moe_dist.core.files import read_json

CHAT_TEMPLATE, CHAT_TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
TODAY = datetime(2024, 7, 26)  # the date that Llama 3's templates write without strftime_now
# Around a special token that a message spells. Samples contain no lone surrogates (data/shards/samples.py).
BEGIN, END = "\ud800", "\udfff"
_MARKED = re.compile(f"{BEGIN}(.*?){END}", re.DOTALL)
_MARKS = re.compile(f"[{BEGIN}{END}]")
ChatMessages = Sequence[Mapping[str, str]]  # each with `role` and `content`


class RefusedConversation(Exception):
    """Raised if a template refuses a conversation, for example because the roles do not alternate."""


class ChatTemplate:
    """A tokenizer's chat template, with the function that encodes rendered conversations.

    The template is compiled when it is first used. If it is missing or has errors, UserError is raised at that time.
    """

    def __init__(
        self,
        where: Path,
        source: str | None = None,
        encode: Callable[[str, bool], list[int]] | None = None,
        special: Mapping[str, str] | None = None,
        marked: Sequence[str] = (),
    ) -> None:
        """where: the tokenizer's file or folder, for error messages. source: the template; None if there is none.

        encode: a function that encodes a text. If its second argument is true, special tokens in the text become their
        ids. special: the text of each special token that the template can name, keyed by name, such as bos_token.
        marked: the texts of all special tokens.
        """
        self._where, self._source, self._encode, self._special = where, source, encode, dict(special or {})
        longest_first = sorted(filter(None, marked), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @property
    def digest(self) -> str:
        """Return a digest of the template and its named special tokens. It is empty if there is no template."""
        content = json.dumps([self._source, self._special], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16] if self._source is not None else ""

    def render(self, messages: ChatMessages, *, generation: bool) -> str:
        """Return the conversation as text. generation: whether the text ends with the beginning of an answer.

        Raises RefusedConversation if the template refuses the messages, and UserError if there is no template or if
        rendering fails.
        """
        marked = [{k: self._spelled.sub(rf"{BEGIN}\g<0>{END}", v) for k, v in m.items()} for m in messages]
        template = self._template
        try:
            return template.render(
                **self._special, messages=marked, tools=None, documents=None, add_generation_prompt=generation
            )
        except RefusedConversation:
            raise
        except Exception as error:  # a template may do anything to its values
            raise UserError(f"the chat template of {self._where} fails: {_line(error)}") from None

    def encode(self, text: str) -> list[int]:
        """Encode a rendered conversation or its beginning, without adding BOS or EOS."""
        if self._encode is None:
            raise ValueError("a tokenizer without a chat template encodes no conversation")
        ids: list[int] = []
        for number, part in enumerate(_MARKED.split(text)):  # text, spelled token, text, spelled token, ..., text
            if part := _MARKS.sub("", part):
                ids += self._encode(part, number % 2 == 0)
        return ids

    @cached_property
    def _template(self) -> jinja2.Template:
        if self._source is None:
            raise UserError(
                f"the tokenizer {self._where} has no chat template, which `messages` and `conversations` need: set "
                "data.text_tokenizer to the Hugging Face folder of a chat model, or write `prompt` and `answer`"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
        try:
            return environment.from_string(self._source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of {self._where} is not valid: {_line(error)}") from None


def read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the source of a folder's chat template, or None if there is none.

    If there are several templates, the one named `default` is returned. Raises UserError if there are several but none
    has this name, or if the template is not UTF-8 or not a string.

    config: the content of tokenizer_config.json.
    """
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"the chat template {file} is not UTF-8") from None
    found = config.get("chat_template")
    if found is None and (folder / CHAT_TEMPLATE_JSON).is_file():
        found = read_json(folder / CHAT_TEMPLATE_JSON).get("chat_template")
    if isinstance(found, list):  # several templates, each with a name
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}.get("default", 0)
    if found is not None and not isinstance(found, str):
        raise UserError(f"{folder} has a chat_template that is neither a text nor a list with one named 'default'")
    return found


def _refuse(message: str) -> NoReturn:
    raise RefusedConversation(cut(" ".join(_MARKS.sub("", str(message)).split())))


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _line(error: Exception) -> str:
    """Return an exception's type and message in one short line, without the BEGIN and END markers."""
    return cut(" ".join(_MARKS.sub("", f"{type(error).__name__}: {error}").split()))


class _Generation(Extension):
    """The tag {% generation %}, with which some templates enclose answers. It has no effect here."""

    tags = {"generation"}  # noqa: RUF012, declared by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

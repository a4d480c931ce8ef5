"""The prompt: a row's fields through a template, then through the model's chat template, then to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from real_fast.config import PromptConfig
from real_fast.errors import PromptError, RowError
from real_fast.prompt.guard import Guard, Marked
from real_fast.prompt.markup import render
from real_fast.prompt.template import PromptRow, Template
from real_fast.score.ending import TEMPLATE_ERRORS
from real_fast.score.scale import ScoreScale

_BEGINNING = 16  # characters per token: most texts have fewer
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass
class _Sample:
    """A row that stands in for real ones while a template is tried out."""

    instruction: str = "Sample instruction."
    response: str = "Sample response."
    rubric: str = "Sample rubric."
    reference_answer: str = "Sample reference."
    messages: list[dict[str, str]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class PromptBuilder:
    """Builds the prompt of a judge row.

    The template is rendered with the row's text as data: braces or Jinja syntax in it stay as they are, and what is
    graded cannot end its turn and go on as the judge (:mod:`real_fast.prompt.guard`). The template itself and the
    system message are trusted. Everything that can be wrong with a template is found at construction, on sample rows
    with and without the optional fields; one that uses further fields of the rows is first tried on them.

    Args:
        config: Template, system message, arguments of the chat template.
        tokenizer: A Transformers tokenizer. Without a chat template the prompt is plain text: the system message, the
            user message and a line end, after the tokenizer's BOS where its ``encode`` would add one. A chat template
            without a place for a system message gets it at the start of the user's; one that leaves its generation
            prompt out gets what it writes in front of an answer.
        scale: Gives templates the phrase and the scores.

    Attributes:
        source: The template's text, as it was read at construction.
        guard: Encodes what is data.

    Raises:
        PromptError: Missing or broken template, a variable that does not exist, a chat template that fails.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any, scale: ScoreScale) -> None:
        self.tokenizer = tokenizer
        self.system = config.system
        self._kwargs = dict(config.chat_template_kwargs)
        fixed = {
            "phrase": scale.phrase.rstrip(),
            "scores": list(scale.shown),
            "min_score": scale.shown[0],
            "max_score": scale.shown[-1],
        }
        self.guard = Guard(tokenizer, self._kwargs)
        self._template = Template(config.template, fixed, self.guard.data)
        self.source = self._template.source
        if not self.uses("extra"):
            for row in (_Sample(rubric="", reference_answer=""), _Sample()):
                if _Sample.response not in self.chat(row):
                    raise PromptError("the model's chat template drops a part of the message: it cannot hold a prompt")

    def uses(self, variable: str) -> bool:
        """Whether the template uses a variable, e.g. "rubric"."""
        return variable in self._template.used

    def text(self, row: PromptRow) -> str:
        """The user message.

        Raises:
            PromptError: The template fails on this row.
        """
        return self.guard.shown(self._template.render(row))

    def chat(self, row: PromptRow) -> str:
        """The whole prompt as text: chat template applied, generation prompt added.

        A row's ``messages`` are the prompt as they are, with neither template nor ``prompt.system``; where the last one
        is the assistant's, the answer goes on in it.

        Raises:
            PromptError: The template, or the model's chat template, fails on this row.
        """
        return self.guard.shown(self.marked(row))

    def ids(self, row: PromptRow) -> list[int]:
        """The whole prompt as token ids, turn ends and other special tokens of the chat template kept.

        Raises:
            PromptError: The template, or the model's chat template, fails on this row.
        """
        return self.encode([self.marked(row)])[0]

    def marked(self, row: PromptRow) -> Marked:
        """The whole prompt with borders around what is data, for :meth:`encode`.

        Raises:
            PromptError: The template, or the model's chat template, fails on this row.
        """
        if row.messages:
            return Marked(self._rendered([self._ready(message) for message in row.messages]))
        messages = [{"role": "user", "content": self._template.render(row)}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return Marked(self._rendered(messages))

    def encode(self, marked: Sequence[Marked]) -> list[list[int]]:
        """Token ids of several prompts as :meth:`marked` gives them; many at once use all cores.

        Raises:
            PromptError: A row's text that this tokenizer cannot encode but as a control token.
        """
        return self.guard.encode(marked)

    def check_length(self, marked: Marked, most: int) -> None:
        """Refuse a prompt that is far too long by its beginning: a text of megabytes takes seconds to encode whole.

        Args:
            marked: As :meth:`marked` gives it.
            most: Tokens that it may have; one of up to twice as many may pass.

        Raises:
            RowError: It has more than twice as many.
        """
        text, size = self.guard.shown(marked), _BEGINNING * most
        while size < len(text):
            if len(self.tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]) > 2 * most:
                raise RowError(f"prompt is too long: over {2 * most} tokens, prompt.max_tokens is {most}")
            size *= 4

    def _ready(self, message: Any) -> dict[str, str]:
        """A message of a ready-made prompt, whose content is data."""
        role, content = (message.get(k) for k in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise PromptError(
                f"messages: each is {{role, content}}, a role of {', '.join(ROLES)} and text, not {str(message)[:60]}"
            )
        return {"role": role, "content": self.guard.data(self.guard.hidden(content))}

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        """Messages through the model's chat template, nothing left out."""
        markup = self.guard.markup
        if not markup.has_template:
            text = "\n\n".join(message["content"] for message in messages) + "\n"
            return self._bos(text) + text
        if messages[0]["role"] == "system" and not markup.system_role and len(messages) > 1:
            joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{**messages[1], "content": joined}, *messages[2:]]
        roles = ", ".join(message["role"] for message in messages)
        try:
            text = render(self.tokenizer, messages, self._kwargs)
        except TEMPLATE_ERRORS as error:
            found = f"{type(error).__name__}: {error}"
            raise PromptError(f"the model's chat template fails on messages by {roles}: {found}") from error
        if self.guard.count(text) < sum(self.guard.count(message["content"]) for message in messages):
            raise PromptError(f"the model's chat template drops a message, or a part of one (messages by {roles})")
        return text + ("" if messages[-1]["role"] == "assistant" else markup.generation)

    def _bos(self, text: str) -> str:
        """The BOS token where ``encode`` adds one by itself and the text has none, else nothing."""
        bos = self.tokenizer.bos_token
        adds = bos and self.tokenizer.encode("text")[:1] == [self.tokenizer.bos_token_id]
        return bos if adds and not text.startswith(bos) else ""

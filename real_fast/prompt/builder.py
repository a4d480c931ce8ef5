"""The prompt: a row's fields through a template, then through the model's chat template, then to token ids."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment

from real_fast.config import PromptConfig
from real_fast.errors import PromptError
from real_fast.score.scale import ScoreScale

TEMPLATES = Path(__file__).parent / "templates"

# What a template can use; the first four come from the row, the others from the score scale.
ROW_FIELDS = ("instruction", "response", "rubric", "reference_answer")
VARIABLES = (*ROW_FIELDS, "phrase", "scores", "min_score", "max_score")

# What a template's own code can raise on a row's text; jinja2.TemplateError covers undefined names and the sandbox.
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
ROLES = ("system", "developer", "user", "assistant", "tool")
_RESERVED = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_tensors",
    "return_dict",
)


class PromptRow(Protocol):
    """The fields of a row that a prompt is made of."""

    instruction: str
    response: str
    rubric: str
    reference_answer: str
    messages: list[dict[str, str]]
    extra: dict[str, Any]


@dataclass
class _Sample:
    """A row that stands in for real ones while a template is tried out."""

    instruction: str = "Sample instruction."
    response: str = "Sample response."
    rubric: str = "Sample rubric."
    reference_answer: str = "Sample reference."
    messages: list[dict[str, str]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def template_path(name: str) -> Path:
    """The file of a template: one of the package by its bare name ("judge"), anything with a suffix as a path.

    Raises:
        PromptError: There is no such template; the message lists the package's own.
    """
    path = Path(name).expanduser()
    if not path.suffix:
        path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise PromptError(
            f"prompt.template {name!r}: there is no file {path.absolute()}. "
            f"Give a .jinja or .txt file, or one of the package's: {known}"
        )
    if path.suffix not in (".jinja", ".j2", ".txt"):
        raise PromptError(f"prompt.template {name!r}: a template is a .jinja, .j2 or .txt file, not {path.suffix}")
    return path


class PromptBuilder:
    """Builds the prompt of a judge row.

    The template is rendered with the row's text as data, so braces or Jinja syntax in it stay as they are, and a
    special token (the end of a turn, say) is written with a space behind its first character: what is graded must not
    be able to end its turn and go on as the judge. Lines that
    hold only a Jinja statement leave no trace, as in chat templates; in a .txt template ``{scores}`` is a
    comma-separated list. Everything that can be wrong with a template is found at construction, on sample rows with and
    without the optional fields.

    Args:
        config: Template, system message, arguments of the chat template.
        tokenizer: A Transformers tokenizer. Without a chat template the prompt is plain text: the system message, the
            user message and a line end, after the tokenizer's BOS where its ``encode`` would add one.
        scale: Gives templates the phrase and the scores.

    Raises:
        PromptError: Missing or broken template, a variable that does not exist, a chat template that fails.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any, scale: ScoreScale) -> None:
        self.name = config.template
        self.tokenizer = tokenizer
        self.system = config.system
        self._kwargs = dict(config.chat_template_kwargs)
        self._fixed: dict[str, Any] = {
            "phrase": scale.phrase.rstrip(),
            "scores": list(scale.texts),
            "min_score": scale.texts[0],
            "max_score": scale.texts[-1],
        }
        self._render, self._used = self._compile(template_path(config.template))
        self._has_chat = bool(getattr(tokenizer, "chat_template", None))
        self._system_role = True
        self._special = _special_tokens(tokenizer)
        self._same_int: dict[int, int] = {}
        for row in (_Sample(), _Sample(rubric="", reference_answer="")):
            self.text(row)
        self._try_chat()

    def uses(self, variable: str) -> bool:
        """Whether the template uses a variable, e.g. "rubric"."""
        return variable in self._used

    def text(self, row: PromptRow) -> str:
        """The user message.

        Raises:
            PromptError: The template fails on this row.
        """
        fields = {name: self._special.sub(_broken, getattr(row, name)) for name in ROW_FIELDS}
        try:
            return self._render(fields | self._fixed)
        except _RENDER_ERRORS as error:
            raise PromptError(f"prompt.template {self.name!r} fails: {type(error).__name__}: {error}") from error

    def chat(self, row: PromptRow) -> str:
        """The whole prompt as text: chat template applied, generation prompt added.

        A row's ``messages`` are the prompt as they are, with neither template nor ``prompt.system``; where the last one
        is the assistant's, the answer goes on in it.

        Raises:
            PromptError: The template, or the model's chat template, fails on this row.
        """
        ready = [self._ready(message) for message in row.messages]
        text = "" if ready else self.text(row)
        try:
            return self._rendered(ready) if ready else self._chat(text)
        except _RENDER_ERRORS as error:
            raise PromptError(f"the model's chat template fails: {type(error).__name__}: {error}") from error

    def ids(self, row: PromptRow) -> list[int]:
        """The whole prompt as token ids, turn ends and other special tokens of the chat template kept.

        Raises:
            PromptError: The template, or the model's chat template, fails on this row.
        """
        return self.encode([self.chat(row)])[0]

    def encode(self, chats: Sequence[str]) -> list[list[int]]:
        """Token ids of several prompts as :meth:`chat` gives them; many at once use all cores."""
        batch = self.tokenizer(list(chats), add_special_tokens=False, verbose=False)["input_ids"]
        same = self._same_int.setdefault  # one int object per id, or a large dataset takes 36 bytes a token, not 8
        return [[same(token, token) for token in ids] for ids in batch]

    def _compile(self, path: Path) -> tuple[Callable[[Mapping[str, Any]], str], frozenset[str]]:
        """A template file as a function of its variables, with the names that it uses."""
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"prompt.template {self.name!r}: cannot read {path}: {error}") from error
        render, used = self._format(source) if path.suffix == ".txt" else self._jinja(source)
        if unknown := sorted(used - set(VARIABLES)):
            raise PromptError(
                f"prompt.template {self.name!r} uses {', '.join(map(repr, unknown))}, which does not exist: "
                f"the variables are {', '.join(VARIABLES)}"
            )
        if "response" not in used:
            raise PromptError(f"prompt.template {self.name!r} never uses 'response', which is what there is to grade")
        return render, used

    def _jinja(self, source: str) -> tuple[Callable[[Mapping[str, Any]], str], frozenset[str]]:
        env = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            used = jinja2.meta.find_undeclared_variables(env.parse(source)) - set(env.globals)
            return env.from_string(source).render, frozenset(used)
        except jinja2.TemplateSyntaxError as error:
            raise PromptError(f"prompt.template {self.name!r}, line {error.lineno}: {error.message}") from error

    def _format(self, source: str) -> tuple[Callable[[Mapping[str, Any]], str], frozenset[str]]:
        source = source.removesuffix("\n")
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(source) if name is not None}
        except ValueError as error:
            raise PromptError(
                f"prompt.template {self.name!r}: {error}; write {{{{ and }}}} for braces that are text"
            ) from error

        def render(values: Mapping[str, Any]) -> str:
            return source.format_map({**values, "scores": ", ".join(values["scores"])})

        return render, frozenset(names)

    def _chat(self, user: str) -> str:
        if self.system and not self._system_role:
            user = f"{self.system}\n\n{user}"
        messages = [{"role": "user", "content": user}]
        if self.system and self._system_role:
            messages.insert(0, {"role": "system", "content": self.system})
        return self._rendered(messages)

    def _ready(self, message: Any) -> dict[str, str]:
        """A message of a ready-made prompt, whose content is data."""
        role, content = (message.get(k) for k in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise PromptError(
                f"messages: each is {{role, content}}, a role of {', '.join(ROLES)} and text, not {str(message)[:60]}"
            )
        return {"role": role, "content": self._special.sub(_broken, content)}

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        """Messages through the model's chat template."""
        if not self._has_chat:
            return self._bos() + "\n\n".join(message["content"] for message in messages) + "\n"
        goes_on = messages[-1]["role"] == "assistant"
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                **self._kwargs,
            )
        )

    def _bos(self) -> str:
        """The BOS token where ``encode`` adds one by itself, else nothing."""
        bos = self.tokenizer.bos_token
        return bos if bos and self.tokenizer.encode("text")[:1] == [self.tokenizer.bos_token_id] else ""

    def _try_chat(self) -> None:
        """Find out whether the chat template takes a system message, and that it works and drops nothing."""
        if reserved := sorted(set(self._kwargs) & set(_RESERVED)):
            raise PromptError(f"prompt.chat_template_kwargs has {reserved[0]!r}, which is not for the template to set")
        if not self._has_chat:
            self._system_role = False
            return
        if self.system:
            try:
                self._system_role = self.system.strip() in self._chat("text")
            except jinja2.TemplateError:  # such as Mistral's "roles must alternate": no place for a system message
                self._system_role = False
        if _Sample.response not in self.chat(_Sample()):
            raise PromptError("the model's chat template drops the user's message: it cannot hold a judge prompt")


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds the tokenizer's special tokens in a text."""
    texts = set(tokenizer.all_special_tokens)
    texts |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    several = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, several)) or "(?!)")


def _broken(found: re.Match[str]) -> str:
    return f"{found[0][0]} {found[0][1:]}"

"""From texts to token ids: with the model's tokenizer, or byte by byte where it has none."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from hift_lightning.engine.errors import ConfigurationError

Message = dict[str, str]
ASSISTANT = "assistant"
# what may stand for any text before a piece: a token may go beyond one of them, hardly beyond both
_STAND_INS = ("\n", "a")
# no content of a message
_NO_CONTENT = "\ue000"


class Piece(NamedTuple):
    """A stretch of a document.

    Args:
        text: what it says.
        trained: whether the model is trained to say it.
    """

    text: str
    trained: bool


class Encoder(Protocol):
    """What the data need of a tokenizer.

    `vocab_size` is the number of different ids, `start` the ids that each document begins with, `end` the id that
    it ends with, and `fingerprint` another text for whatever gives other ids.
    """

    vocab_size: int
    start: tuple[int, ...]
    end: int
    fingerprint: str

    def encode(self, text: str, after: int | None = None) -> Sequence[int]:
        """Return the ids of a piece of a document that stands `after` an id, or begins the document."""

    def chat(self, messages: Sequence[Message], place: str) -> list[list[Piece]]:
        """Write a conversation down, as one document or as several; the assistant's turns are trained, each once."""


class ByteEncoder:
    """The bytes of UTF-8 as ids 0 to 255, and 256 at the end of a document."""

    vocab_size = 257
    start: tuple[int, ...] = ()
    end = 256
    fingerprint = "bytes"

    def encode(self, text: str, after: int | None = None) -> Sequence[int]:
        """Return the bytes of `text`."""
        return text.encode("utf-8")

    def chat(self, messages: Sequence[Message], place: str) -> list[list[Piece]]:
        """Write a conversation down as `plain_chat` does."""
        return [plain_chat(messages)]


class TokenizerEncoder:
    """A tokenizer of transformers, with its own chat template where it has one.

    Args:
        tokenizer: has an end-of-text token, or at least a separator.

    Raises:
        ConfigurationError: it has neither.
    """

    def __init__(self, tokenizer: Any) -> None:
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if end is None:
            raise ConfigurationError(
                f"The tokenizer `{tokenizer.name_or_path}` has no end-of-text token to put between documents; give "
                "another one with `model.tokenizer.pretrained=/path/to/folder`."
            )
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.end: int = end
        self.start = self._start()
        self.fingerprint = _fingerprint(tokenizer)
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        # SentencePiece sets a space before a text, and none within it
        self._sets_space = self._ids_behind("\n", "a") not in (None, self._ids("a"))
        self._warned_of_template = False

    def encode(self, text: str, after: int | None = None) -> Sequence[int]:
        """Return the ids of a piece of a document, without tokens that the tokenizer would set around it."""
        if after is None or not self._sets_space:
            return self._ids(text)
        before = [self._added[after]] if after in self._added else _STAND_INS
        ids = (self._ids_behind(one, text) for one in before)
        return next((found for found in ids if found is not None), self._ids(text))

    def _start(self) -> tuple[int, ...]:
        """As the model was pretrained: a first token, where the tokenizer sets one before a text by itself."""
        words = (word for word in self._tokenizer.get_vocab() if word not in self._tokenizer.all_special_tokens)
        text = next((word for word in words if self._ids(word)), "")
        plain, first, whole = self._ids(text), self._tokenizer.bos_token_id, self._tokenizer(text).input_ids
        return (first,) if whole[:1] == [first] and plain[:1] != [first] else ()

    def _ids_behind(self, before: str, text: str) -> list[int] | None:
        """Those of `text` where it stands behind another one; `None` where a token belongs to both."""
        ids, of_before = self._ids(before + text), self._ids(before)
        return ids[len(of_before) :] if ids[: len(of_before)] == of_before else None

    def _ids(self, text: str) -> list[int]:
        # `verbose` is for texts that are longer than the model's context; they are cut into rows later
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def chat(self, messages: Sequence[Message], place: str) -> list[list[Piece]]:
        """Write a conversation down with the tokenizer's chat template, or as `plain_chat` does without one.

        Where the template writes a turn of the assistant in another way when others follow, as those do that leave out
        earlier thoughts, each of them ends a document of its own, as it would be said.

        Raises:
            ConfigurationError: the template refuses the conversation, or does not begin a turn as it asks for one.
        """
        if not self._tokenizer.chat_template:
            self._warn_of_template()
            return [plain_chat(messages)]
        turns = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        whole = self._written(messages, place)
        bounds = [self._bounds(messages[: index + 1], place) for index in turns]
        # some templates end a conversation with a token that stands behind no other turn
        last = self._tokenizer.eos_token or ""
        for ends in (
            [after for _, after in bounds],
            [*(after.rstrip().removesuffix(last) for _, after in bounds[:-1]), bounds[-1][1]],
        ):
            if all(whole.startswith(end) for end in ends):
                return [
                    _pieces(whole, [(len(before), len(end)) for (before, _), end in zip(bounds, ends, strict=True)])
                ]
        return [_pieces(after, [(len(before), len(after))]) for before, after in bounds]

    def _bounds(self, messages: Sequence[Message], place: str) -> tuple[str, str]:
        """Write a conversation that ends with a turn of the assistant down, without that turn and with it."""
        after = self._written(messages, place)
        if len(messages) > 1:
            before = self._written(messages[:-1], place, add_generation_prompt=True)
        else:  # templates refuse a conversation without messages
            before, _, _ = self._written([{**messages[0], "content": _NO_CONTENT}], place).partition(_NO_CONTENT)
        if not after.startswith(before):
            raise ConfigurationError(
                f"{place}: the chat template of `{self._tokenizer.name_or_path}` does not begin message "
                f"{len(messages)} as it asks for an answer, so what to train on cannot be told; leave these out, or "
                "give `prompt` and `completion`."
            )
        return before, after

    def _warn_of_template(self) -> None:
        if not self._warned_of_template:
            self._warned_of_template = True
            warnings.warn(
                f"The tokenizer `{self._tokenizer.name_or_path}` has no chat template, so conversations are written as "
                "lines `role: content`, and the model learns to answer after `assistant:`; ask it so, or give a "
                "tokenizer that has one with `model.tokenizer.pretrained=/path/to/folder`.",
                stacklevel=2,
            )

    def _written(self, messages: Sequence[Message], place: str, **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise ConfigurationError(
                f"{place}: the chat template of `{self._tokenizer.name_or_path}` refuses the messages ({error}); mend "
                "them or give `prompt` and `completion`."
            ) from error
        return text


def encoder_of(tokenizer: Any) -> Encoder:
    """Return the encoder for a tokenizer of transformers, or that for bytes if it is `None`."""
    return ByteEncoder() if tokenizer is None else TokenizerEncoder(tokenizer)


def plain_chat(messages: Sequence[Message]) -> list[Piece]:
    """Write a conversation down as lines `role: content`, of which the assistant's contents are trained."""
    pieces = []
    for message in messages:
        trained = message["role"] == ASSISTANT
        pieces += [Piece(f"{message['role']}:", False), Piece(f" {message['content']}\n", trained)]
    return pieces


def _pieces(text: str, turns: Sequence[tuple[int, int]]) -> list[Piece]:
    """Cut a conversation in what is trained, its assistant's turns, and what is not."""
    pieces: list[Piece] = []
    position = 0
    for begin, end in turns:
        # the line break that many templates set after the end of a turn is nothing for the model to say
        said = text[begin:end].rstrip()
        pieces += [Piece(text[position:begin], False), Piece(said, True)]
        position = begin + len(said)
    rest = text[position:].rstrip()
    return [*pieces, Piece(rest, False)] if rest else pieces


def _fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    known = [
        type(tokenizer).__name__, rules, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.sep_token_id,
        tokenizer.bos_token_id, tokenizer.split_special_tokens,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(known).encode("utf-8")).hexdigest()

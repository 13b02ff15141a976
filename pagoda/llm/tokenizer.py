"""Text to token ids and back: byte-level BPE, chat template, and decoding as tokens arrive."""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Encoder

from .errors import ModelError

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types; 1 is a normal token
END_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
OTHER_FILE = "Choose a model file with a byte-level BPE tokenizer, such as SmolLM2's."
DOWNLOAD_AGAIN = "Download or copy the file again."
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TokenizerParts:
    """What a model file says about its tokenizer.

    source: the file, for messages; model: the algorithm ('gpt2' is byte-level BPE); pre: how text
    is split before merging; tokens[id]: text in GPT-2's byte alphabet; token_types[id]: llama.cpp's
    type; merges: 'left right', best first; ids are None where there is none.
    """

    source: str
    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    chat_template: str | None


def _splitter(parts: TokenizerParts) -> pre_tokenizers.PreTokenizer:
    """The split that the merges were trained with; names as in llama.cpp's `tokenizer.ggml.pre`."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if parts.pre == "gpt-2":
        return words
    if parts.pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    rule = "its pre-tokenizer must be 'gpt-2' or 'smollm'"
    raise ModelError(parts.source, rule, f"it is {parts.pre!r}", OTHER_FILE)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: each byte as one printable character, itself where it prints."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


BYTES = _byte_alphabet()


class Tokenizer:
    """A model's tokenizer. Raises ModelError when the parts do not make one."""

    def __init__(self, parts: TokenizerParts):
        self.parts = parts
        if parts.model != "gpt2":
            rule = "its tokenizer must be byte-level BPE, 'gpt2'"
            raise ModelError(parts.source, rule, f"it is {parts.model!r}", OTHER_FILE)
        splitter = _splitter(parts)
        self._ids = {token: id_ for id_, token in enumerate(parts.tokens)}
        if len(parts.token_types) != len(parts.tokens) or len(self._ids) != len(parts.tokens):
            rule = "its tokens must be distinct and each must have a type"
            value = f"{len(parts.tokens)} tokens, {len(self._ids)} distinct, "
            value += f"{len(parts.token_types)} types"
            raise ModelError(parts.source, rule, value, DOWNLOAD_AGAIN)
        self._encoder = self._build(splitter)
        special = zip(parts.tokens, parts.token_types, strict=True)
        self._special = {self._ids[token] for token, type_ in special if type_ == CONTROL}
        named = {self._ids[name] for name in END_NAMES if name in self._ids} & self._special
        eos = set() if parts.eos_id is None else {parts.eos_id}
        self.stop_ids: frozenset[int] = frozenset(named | eos)
        """Token ids that end an answer."""

    def _build(self, splitter: pre_tokenizers.PreTokenizer) -> Encoder:
        merges = []
        for merge in self.parts.merges:
            left, _, right = merge.partition(" ")
            if not {left, right, left + right} <= self._ids.keys():
                rule = "each merge must join two tokens into a third"
                value = f"one is {merge!r}"
                raise ModelError(self.parts.source, rule, value, DOWNLOAD_AGAIN)
            merges.append((left, right))
        encoder = Encoder(models.BPE(self._ids, merges))
        encoder.pre_tokenizer = splitter
        encoder.decoder = decoders.ByteLevel()
        for type_, special in ((CONTROL, True), (USER_DEFINED, False)):
            encoder.add_tokens([
                AddedToken(token, special=special, normalized=False)
                for token, its_type in zip(self.parts.tokens, self.parts.token_types, strict=True)
                if its_type == type_
            ])
        return encoder

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; special tokens written out in it count as such."""
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        if self.parts.add_bos and self.parts.bos_id is not None:
            return [self.parts.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all tokens together, without special tokens; bad UTF-8 becomes U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text token by token, as the ids arrive; the pieces together are `decode(ids)`.

        A character whose bytes lie in several tokens comes with the last of them; what is
        incomplete at the end comes as U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for id_ in ids:
            if piece := decoder.decode(self._bytes(id_)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _bytes(self, id_: int) -> bytes:
        """The bytes that a token stands for; none for a special token or an id past the tokens."""
        if id_ in self._special or id_ >= len(self.parts.tokens):
            return b""
        token = self.parts.tokens[id_]
        try:
            return bytes(BYTES[character] for character in token)
        except KeyError:  # a user-defined token is plain text, not in the byte alphabet
            return token.encode()

    @cached_property
    def _template(self) -> jinja2.Template:
        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # The template is part of a downloaded file: it runs in jinja's sandbox.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.parts.chat_template or CHATML)
        except jinja2.TemplateError as why:
            rule = "its chat template must be valid Jinja"
            raise ModelError(self.parts.source, rule, str(why), OTHER_FILE) from None

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as the model was trained to see it, ready for the assistant's turn.

        messages: {'role': 'system' | 'user' | 'assistant', 'content': text}, oldest first.
        """
        names = {
            name: "" if id_ is None else self.parts.tokens[id_]
            for name, id_ in (("bos_token", self.parts.bos_id), ("eos_token", self.parts.eos_id))
        }
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **names)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as why:
            rule = "its chat template must accept the conversation"
            value = f"it says {str(why).rstrip('.')}"
            raise ModelError(self.parts.source, rule, value, "Start a new conversation.") from None

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of `render_chat(messages)`; the template itself puts in any begin token."""
        for message in messages:
            _check_text(message["content"])
        return self._encoder.encode(self.render_chat(messages), add_special_tokens=False).ids


def _check_text(text: str) -> None:
    """Raises ModelError if bytes that were no UTF-8 have come in as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as wrong:
        value = f"character {wrong.start} is {text[wrong.start]!r}"
        remedy = "Give the text in UTF-8."
        raise ModelError("the message", "must be Unicode text", value, remedy) from None

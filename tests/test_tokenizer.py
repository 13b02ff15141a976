"""pagoda.llm.tokenizer: ids, chat template, and text that streams without half characters."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers

from pagoda.llm import ModelError, ModelFile, Tokenizer, TokenizerParts
from pagoda.llm.tiny_model import MERGES, SPECIAL, tiny_tokens
from pagoda.llm.tokenizer import BYTES, CONTROL, USER_DEFINED

OTHER = "Choose a model file with a byte-level BPE tokenizer, such as SmolLM2's."
AGAIN = "Download or copy the file again."


def tiny_parts(**changes):
    parts = TokenizerParts(
        source="tiny.gguf",
        model="gpt2",
        pre="gpt-2",
        tokens=tiny_tokens(),
        token_types=[CONTROL if token in SPECIAL else 1 for token in tiny_tokens()],
        merges=list(MERGES),
        bos_id=1,
        eos_id=2,
        add_bos=False,
        chat_template=None,
    )
    return dataclasses.replace(parts, **changes)


TINY = Tokenizer(tiny_parts())


def test_byte_alphabet_is_the_librarys():
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))


@given(st.text())
def test_plain_text_survives(text):
    assert TINY.decode(TINY.encode(text)) == text


@given(st.lists(st.integers(0, len(tiny_tokens()) - 1)))
def test_decoding_is_the_librarys_on_any_ids(ids):
    tokens = {token: id_ for id_, token in enumerate(tiny_tokens())}
    judge = Encoder(models.BPE(tokens, [tuple(merge.split(" ")) for merge in MERGES]))
    judge.decoder = decoders.ByteLevel()
    judge.add_special_tokens(list(SPECIAL))
    assert TINY.decode(ids) == judge.decode(ids)


@given(st.text())
def test_streamed_pieces_are_whole_characters(text):
    ids = TINY.encode(text)
    pieces = list(TINY.stream(iter(ids)))
    assert "".join(pieces) == text
    assert all(pieces)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_character_comes_with_its_last_byte():
    ids = TINY.encode("a😀b")
    arrived = []
    stream = TINY.stream(arrived.append(id_) or id_ for id_ in ids)
    assert next(stream) == "a"
    assert next(stream) == "😀"
    assert len(arrived) == 5  # one for 'a', four bytes of the emoji, and no more
    assert next(stream) == "b"


def test_an_incomplete_end_is_shown_as_such():
    assert list(TINY.stream(TINY.encode("a😀")[:-1])) == ["a", "\ufffd"]


def test_special_and_unknown_ids_have_no_text():
    assert TINY.decode([1, *TINY.encode("the"), 2, 99_999]) == "the"


def test_special_tokens_written_out_are_one_id():
    assert TINY.encode("<|im_start|>the<|im_end|>") == [1, TINY.encode("the")[0], 2]


def test_user_defined_tokens_are_text():
    tokens = [*tiny_tokens(), "<naïve tool>"]
    types = [*tiny_parts().token_types, USER_DEFINED]
    tokenizer = Tokenizer(tiny_parts(tokens=tokens, token_types=types))
    ids = tokenizer.encode("the<naïve tool>the")
    assert ids == [TINY.encode("the")[0], len(tokens) - 1, TINY.encode("the")[0]]
    assert tokenizer.decode(ids) == "the<naïve tool>the"


def test_begin_token_only_where_the_file_asks_for_it():
    tokenizer = Tokenizer(tiny_parts(add_bos=True))
    assert tokenizer.encode("the") == [1, *TINY.encode("the")]


def test_stop_ids():
    assert TINY.stop_ids == {0, 2}
    assert Tokenizer(tiny_parts(eos_id=5)).stop_ids == {0, 2, 5}
    assert Tokenizer(tiny_parts(token_types=[1] * len(tiny_tokens()))).stop_ids == {2}


def test_default_template_is_chatml():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello {{ 1 }}"},
    ]
    assert TINY.render_chat(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello {{ 1 }}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert TINY.encode_chat(messages)[0] == 1


def test_the_files_own_template():
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(tiny_parts(chat_template=template, add_bos=True))
    messages = [{"role": "user", "content": "the"}]
    assert tokenizer.render_chat(messages) == "<|im_start|>[user]the"
    assert tokenizer.encode_chat(messages).count(1) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "llama"},
            f"its tokenizer must be byte-level BPE, 'gpt2', but it is 'llama'. {OTHER}",
        ),
        (
            {"pre": "mystery"},
            f"its pre-tokenizer must be 'gpt-2' or 'smollm', but it is 'mystery'. {OTHER}",
        ),
        (
            {"token_types": [1]},
            (
                "its tokens must be distinct and each must have a type, but "
                f"267 tokens, 267 distinct, 1 types. {AGAIN}"
            ),
        ),
        (
            {"merges": ["t h", "q z"]},
            f"each merge must join two tokens into a third, but one is 'q z'. {AGAIN}",
        ),
    ],
)
def test_parts_that_make_no_tokenizer(changes, message):
    with pytest.raises(ModelError) as caught:
        Tokenizer(tiny_parts(**changes))
    assert str(caught.value) == f"tiny.gguf: {message}"


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("{% for %}", "its chat template must be valid Jinja"),
        (
            "{{ raise_exception('roles must alternate') }}",
            (
                "its chat template must accept the conversation, but it says roles must alternate."
                " Start a new conversation."
            ),
        ),
        (
            "{{ messages.__class__.__mro__ }}",  # jinja's sandbox at work
            (
                "its chat template must accept the conversation, but it says access to attribute "
                "'__class__' of 'list' object is unsafe. Start a new conversation."
            ),
        ),
    ],
)
def test_templates_that_fail(template, rule):
    with pytest.raises(ModelError) as caught:
        Tokenizer(tiny_parts(chat_template=template)).render_chat([])
    assert str(caught.value).startswith(f"tiny.gguf: {rule}")


def test_smollm2(smollm2_path):
    tokenizer = Tokenizer(ModelFile(smollm2_path).tokenizer_parts())
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.decode([7042, 30]) == " Paris."
    assert len(tokenizer.encode("1234")) == 4  # digits one by one
    assert tokenizer.stop_ids == {0, 2}
    text = "Grüße, 世界! 😀 naïve\n\n\tx = 1"
    assert "".join(tokenizer.stream(tokenizer.encode(text))) == text
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )

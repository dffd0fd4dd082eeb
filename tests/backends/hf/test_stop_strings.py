"""Stop strings: text is decoded seldom, and a completion ends where decoding it always would end it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from grpo.backends.hf.stop_strings import StopStrings

TEXTS = ["<answer> 12 + 3 </answer>", "naïve café 你好 👍🏽 done.\n\n", "User: hello\nAssistant: 你 好 x = 1"] * 4
STOPS = ["</answer>", "\n\n", "User:", "你好", "👍🏽", "e", "café", " 1"]


def byte_level() -> PreTrainedTokenizerFast:
    """As Qwen's and SmolLM2's: tokens are bytes, and may be parts of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's and Gemma's: a token may begin with a space, which decoding a text's first token drops."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {"byte level": byte_level(), "metaspace": metaspace()}


def where_it_ends(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], stop: StopStrings) -> int | None:
    return next((n for n in range(1, len(token_ids) + 1) if stop.ends(token_ids[:n])), None)


class Always(StopStrings):
    def _may_end(self, token: int) -> bool:
        return True


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_completion_ends_where_decoding_every_token_would_end_it(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    strings = data.draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=3))
    words = data.draw(st.lists(st.sampled_from([*STOPS, "<answer>", " x", "é", "你", "n", "\n", "na"]), max_size=12))
    drawn = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=6))
    token_ids = drawn + tokenizer.encode("".join(words), add_special_tokens=False)
    seldom, always = StopStrings(tokenizer, strings), Always(tokenizer, strings)
    assert where_it_ends(tokenizer, token_ids, seldom) == where_it_ends(tokenizer, token_ids, always)


MANY_BYTES = ["答案完毕", "👍🏽👩‍🔬", "конец", "\u0301e\u0301"]


def unmerged(kind: str, text: str) -> list[int]:
    """The text's bytes as a token each: what a tokenizer makes of characters that it was not trained on."""
    tokenizer = KINDS[kind]
    if kind == "metaspace":
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    return tokenizer.convert_tokens_to_ids(list(byte_characters(text)))


def byte_characters(text: str) -> str:
    """The characters by which byte-level tokenizers write a text's bytes."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("string", MANY_BYTES)
@pytest.mark.parametrize("before", ["", "好", "a好好好好好好", "ж好👍"])
def test_a_stop_string_of_several_bytes_a_character_is_found(kind: str, string: str, before: str) -> None:
    tokenizer = KINDS[kind]
    token_ids = unmerged(kind, before + string + "。还有")
    end = len(unmerged(kind, before + string))
    assert string in tokenizer.decode(token_ids[:end])
    assert where_it_ends(tokenizer, token_ids, StopStrings(tokenizer, [string])) == end


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_a_text_hide_no_stop_string(kind: str) -> None:
    """A model has more ids than its tokenizer, and a new one samples them."""
    tokenizer = KINDS[kind]
    empty = tokenizer.vocab_size + 7
    token_ids = [token for one in unmerged(kind, "完毕</answer> x") for token in [one, *[empty] * 20]]
    end = where_it_ends(tokenizer, token_ids, StopStrings(tokenizer, ["毕</answer>"]))
    assert end == 21 * (len(unmerged(kind, "完毕</answer>")) - 1) + 1


def test_most_tokens_are_not_decoded() -> None:
    tokenizer = KINDS["byte level"]
    stop = StopStrings(tokenizer, ["</answer>"])
    assert sum(stop._may_end(token) for token in range(tokenizer.vocab_size)) < 0.6 * tokenizer.vocab_size
    assert not stop._may_end(tokenizer.encode(" 12")[0])
    assert StopStrings(tokenizer, []).ends([5]) is False

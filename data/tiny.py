"""A tokenizer and models of about a million parameters, for runs without a model hub or a GPU.

Numbers, operators and a few words are single tokens, so that a small model can learn to search instead of to spell. Any
other ASCII text falls back to letters and digits. ``data/tiny_base/`` holds the weights after a supervised start on
``data/traces.py``. ``python -m data.tiny FOLDER`` writes an untrained model, Llama-shaped (``--width 64 --layers 3``: a
smaller one), or with ``--arch deepseek_v3`` one of latent attention and experts; with ``--words word_sums``, its
tokenizer also has the words of that task.
"""

from __future__ import annotations

import argparse
import importlib
import re
import string
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WORDS = ("yes", "no", "so", "then", "try", "wait", "check", "target", "give", "up", "answer")
LARGEST_WHOLE_NUMBER = 299  # larger numbers take one more token for each further digit: 729 is 72 ##9
CONTEXT = 512
WIDTH, LAYERS, WIDTH_OF_HEAD = 128, 4, 32
TASKS_WITH_WORDS = ("word_sums", "one_liners", "calculator_traces", "number_guess")
"""Modules of data/ whose WORDS a tokenizer may have too."""


def build_tokenizer(extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """WordPiece over numbers, tags, punctuation and words; spaces are not kept, decoding puts one between tokens.

    ``(6+3)*3`` comes back as ``( 6 + 3 ) * 3``, ``1234`` as ``1234``. The tags are ordinary tokens and stay in decoded
    text; only padding, end of sequence and unknown are special. A character outside ASCII becomes ``<unk>``.

    ``extra`` pieces become single tokens behind all others, whose ids do not change. A piece need not be a word: ``**``
    and a line break become tokens too (the line break then survives decoding, with a space on either side).
    """
    pieces = [PAD, EOS, UNKNOWN, *TAGS, *string.punctuation]
    pieces += [str(n) for n in range(LARGEST_WHOLE_NUMBER + 1)]
    pieces += [*string.ascii_letters, *WORDS]
    pieces += ["##" + character for character in string.digits + string.ascii_letters]
    pieces = list(dict.fromkeys([*pieces, *extra]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=1000))
    own = sorted((piece for piece in extra if not piece.isalnum()), key=len, reverse=True)  # the longest match first
    words = "|".join([*map(re.escape, own), r"</?(?:think|answer)>|[0-9]+|[A-Za-z]+|\S"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast, *, width: int = WIDTH, layers: int = LAYERS) -> LlamaConfig:
    """Width 128, 4 layers, 4 heads sharing 2 key-value heads, tied embeddings: about 0.85 M parameters. Of width 64 and
    3 layers it is a fifth of that. Raises ValueError where the width is not made of pairs of heads."""
    if width % (2 * WIDTH_OF_HEAD):
        raise ValueError(f"width: {width} is not a multiple of {2 * WIDTH_OF_HEAD}, two heads")
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // WIDTH_OF_HEAD,
        num_key_value_heads=width // (2 * WIDTH_OF_HEAD),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_moe_config(tokenizer: PreTrainedTokenizerFast) -> DeepseekV3Config:
    """DeepSeek-V3 in the width and depth of ``tiny_config``: latent attention, one dense layer, then three in which a
    token goes to two shared experts and to 2 of 8 others, in the best 2 of 4 groups. About 1.5 M parameters, of which a
    token takes as many as the dense model has."""
    return DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        num_nextn_predict_layers=0,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


ARCHITECTURES = {"llama": (tiny_config, LlamaForCausalLM), "deepseek_v3": (tiny_moe_config, DeepseekV3ForCausalLM)}


def make_tiny_model(seed: int = 0, extra: Sequence[str] = (), arch: str = "llama", **size: int) -> PreTrainedModel:
    """An untrained model for ``build_tokenizer(extra)``. Its weights depend on the arguments alone; ``size`` are those
    of ``tiny_config``, for that architecture."""
    tokenizer = build_tokenizer(extra)
    config_of, model_class = ARCHITECTURES[arch]
    set_seed(seed)
    model = model_class(config_of(tokenizer, **size))
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def write_tiny_model(
    folder: str | Path, seed: int = 0, extra: Sequence[str] = (), arch: str = "llama", **size: int
) -> None:
    """Save an untrained model and its tokenizer so that ``from_pretrained(folder)`` loads them."""
    make_tiny_model(seed, extra, arch, **size).save_pretrained(folder)
    build_tokenizer(extra).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write an untrained tiny model and its tokenizer.")
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama", help="what the model is shaped like")
    parser.add_argument("--words", choices=TASKS_WITH_WORDS, help="the task of data/ whose words are tokens too")
    parser.add_argument("--width", type=int, help=f"a multiple of {2 * WIDTH_OF_HEAD}; {WIDTH} without")
    parser.add_argument("--layers", type=int, help=f"{LAYERS} without")
    arguments = parser.parse_args()
    words = importlib.import_module(f"data.{arguments.words}").WORDS if arguments.words else ()
    size = {name: value for name in ("width", "layers") if (value := getattr(arguments, name)) is not None}
    if size and arguments.arch != "llama":
        parser.error(f"--{next(iter(size))} is of --arch llama alone")
    write_tiny_model(arguments.folder, arguments.seed, words, arguments.arch, **size)

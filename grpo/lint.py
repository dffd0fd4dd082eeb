"""Checks of tokenizer, template and prompts against the model, made before its weights load.

Each finds a mistake that would otherwise show hours later as a flat curve: completions that never end, prompts cut
off, a chat template that a base model has never seen. Each says how to cure it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from grpo.config import Recipe
from grpo.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from grpo.tasks import Part, Task


def lint(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    task: Task | None = None,
) -> list[str]:
    """Warnings, for what may be meant. Raises UserError with every problem at once, one a line.

    With ``task``, all its prompts are looked at too (and its completions, with ``stage: sft``).
    """
    errors = [
        *_end_errors(recipe, tokenizer, model_config, generation_config),
        *_length_errors(recipe, model_config),
        *_chat_errors(recipe, tokenizer, stop_token_ids(tokenizer, model_config, generation_config)),
    ]
    if task is not None and not errors:  # without a usable template or EOS there is no telling what rows become
        errors += [*_row_errors(task, task.train), *_row_errors(task, task.held_out)]
    if errors:
        raise UserError("\n".join(errors))
    notes = [f"data: {note}" for note in task.notes] if task is not None else []
    return [*_end_warnings(recipe, tokenizer, model_config, generation_config), *notes]


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig, generation_config: GenerationConfig | None
) -> list[int]:
    """Tokens on which a rollout stops: the end-of-sequence tokens of tokenizer, model and generation config together.

    Instruct models often have several, and which of the three files knows them all differs from model to model.
    """
    sources = (tokenizer.eos_token_id, _text_config(model_config).eos_token_id, _generation_eos(generation_config))
    return sorted(set().union(*map(_as_set, sources)))


def _end_errors(recipe: Recipe, tokenizer: Any, model_config: Any, generation_config: Any) -> Iterator[str]:
    """Completions that can't end."""
    vocabulary = _text_config(model_config).vocab_size
    stops = stop_token_ids(tokenizer, model_config, generation_config)
    if not stops and not recipe.rollout.stop:
        yield (
            "model: no end-of-sequence token in tokenizer, config or generation config: no completion could end before "
            "rollout.max_completion_length. Name a tokenizer that has one (model.tokenizer), or give rollout.stop"
        )
    elif recipe.stage == "sft" and tokenizer.eos_token_id is None:
        yield (
            "model: the tokenizer has no end-of-sequence token to end the examples with: name one that has "
            "(model.tokenizer)"
        )
    if outside := [token for token in stops if token >= vocabulary]:
        yield (
            f"model: end-of-sequence token {outside[0]} ({_name(tokenizer, outside[0])}) is outside the model's "
            f"vocabulary of {vocabulary}, so it is never sampled: tokenizer and model don't belong together "
            f"(model.tokenizer)"
        )


def _end_warnings(recipe: Recipe, tokenizer: Any, model_config: Any, generation_config: Any) -> Iterator[str]:
    """Stop tokens that disagree, and a tokenizer larger than the model."""
    config = _text_config(model_config)
    own, model, generation = map(
        _as_set, (tokenizer.eos_token_id, config.eos_token_id, _generation_eos(generation_config))
    )
    if own and (model or generation) and not own & (generation or model):
        theirs = " and ".join(f"{token} ({_name(tokenizer, token)})" for token in sorted((model | generation) - own))
        yield (
            f"model: the tokenizer ends a text with {tokenizer.eos_token_id} ({tokenizer.eos_token}), the model's "
            f"configuration with {theirs}. Rollouts stop on any of them, supervised examples end with the tokenizer's. "
            f"If completions run into rollout.max_completion_length, name the tokenizer of the model's training "
            f"(model.tokenizer)"
        )
    if not (own or model or generation):
        yield f"model: no end-of-sequence token: completions end only on rollout.stop ({recipe.rollout.stop})"
    if len(tokenizer) > config.vocab_size:
        yield (
            f"model: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: a text that holds one "
            f"of the last would fail. Do they belong together (model.tokenizer)?"
        )


def _length_errors(recipe: Recipe, model_config: Any) -> Iterator[str]:
    """More tokens than the model has positions."""
    positions = getattr(_text_config(model_config), "max_position_embeddings", None)
    prompt, rollout = recipe.data.max_prompt_length, recipe.rollout.max_completion_length
    lengths = {"rollout": rollout, "evaluation": recipe.evaluation.max_completion_length or rollout}
    for section, completion in lengths.items():
        if positions and prompt + completion > positions:
            yield (
                f"data.max_prompt_length ({prompt}) + {section}.max_completion_length ({completion}) is more than the "
                f"{positions} positions of the model: lower one of them"
            )
            return


def _chat_errors(recipe: Recipe, tokenizer: Any, stops: list[int]) -> Iterator[str]:
    """A chat template that isn't there, or that this model was not trained with."""
    if recipe.data.template != "chat":
        return
    cure = (
        "This looks like a base model: take template: r1_zero, tinyzero or none, or the tokenizer of the instruct "
        "model (model.tokenizer)"
    )
    if not tokenizer.chat_template:
        yield f"data.template: chat, but the tokenizer has no chat template. {cure}"
        return
    answer = "An answer."
    turn = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, **recipe.data.chat_template_kwargs)
    except Exception as error:  # a template is a program of its own
        yield f"data.template: the tokenizer's chat template fails: {error}"
        return
    ending = text[text.rindex(answer) + len(answer) :] if answer in text else ""
    if not set(tokenizer.encode(ending, add_special_tokens=False)) & set(stops):
        yield (
            f"data.template: the chat template ends an answer with {ending.strip()!r}, but the model stops on "
            f"{', '.join(_name(tokenizer, token) for token in stops) or 'nothing'}. {cure}"
        )


def _row_errors(task: Task, part: Part) -> Iterator[str]:
    """Prompts (and supervised completions) that are too long, or that hold a chat template's tokens already."""
    recipe, data, markers = task.recipe, task.recipe.data, _turn_markers(task.tokenizer)
    encode_completion = partial(task.tokenizer.encode, add_special_tokens=False)
    too_long, marked, too_long_completions = [], [], []
    for row in part.ids:
        question = part.rows[row][data.prompt_column]
        text, _ = task.render(question, part.rows.place(row))
        if tokens := _longer_than(data.max_prompt_length, text, task.encode):
            too_long.append((tokens, row))
        if data.template != "none" and any(marker in str(question) for marker in markers):
            marked.append(row)
        if recipe.stage == "sft":
            _, completion = task.texts(part, row)
            if tokens := _longer_than(recipe.rollout.max_completion_length - 1, completion, encode_completion):
                too_long_completions.append((tokens + 1, row))  # EOS included
    if too_long:
        yield _too_long("data.max_prompt_length", data.max_prompt_length, "prompts", too_long, part)
    if too_long_completions:
        limit = recipe.rollout.max_completion_length
        yield _too_long("rollout.max_completion_length", limit, "completions to imitate", too_long_completions, part)
    if marked:
        question = str(part.rows[marked[0]][data.prompt_column])
        held = min(marker for marker in markers if marker in question)
        yield (
            f"data.template: {len(marked)} of {len(part)} prompts already hold a template's token, {held} "
            f"(first {part.rows.place(marked[0])}); template: {data.template} would wrap them once more. Take "
            f"template: none for prompts that are rendered already, or take the tokens out"
        )


def _too_long(key: str, limit: int, what: str, found: list[tuple[int, int]], part: Part) -> str:
    tokens, row = max(found, key=lambda pair: pair[0])
    return (
        f"{key}: {len(found)} of {len(part)} {what} are longer than {limit} tokens; the longest has {tokens} "
        f"({part.rows.place(row)}). Raise it, or take those rows out"
    )


def _longer_than(limit: int, text: str, encode: Callable[[str], list[int]]) -> int:
    """The number of tokens if it is above the limit, else 0. A text of few bytes needs no counting."""
    if len(text.encode()) + 2 <= limit:  # no token is less than a byte; BOS and a leading space are two more
        return 0
    tokens = len(encode(text))
    return tokens if tokens > limit else 0


def _turn_markers(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens that a template or the tokenizer puts around texts, and a question should not hold."""
    source = str(tokenizer.chat_template or "")
    ends = {tokenizer.bos_token, tokenizer.eos_token}
    return {token for token in tokenizer.all_special_tokens if token in ends or token in source}


def _text_config(model_config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's part of a configuration that may have others (vision)."""
    return model_config.get_text_config()


def _generation_eos(generation_config: GenerationConfig | None) -> int | list[int] | None:
    return None if generation_config is None else generation_config.eos_token_id


def _as_set(token_ids: int | list[int] | None) -> set[int]:
    if token_ids is None:
        return set()
    return {token_ids} if isinstance(token_ids, int) else set(token_ids)


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else "unknown to the tokenizer"

"""Checks of tokenizer, template and prompts against the model, made before its weights load.

Each check finds a mistake that would otherwise show hours later as a flat curve: completions that never end, prompts
that are cut off, a chat template that a base model has never seen. Its message says how to cure the mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from grpo.config import DataConfig, Recipe, RowsConfig, Source
from grpo.errors import UserError
from grpo.prompts.completion_text import TAGS, CompletionText, special_tokens
from grpo.prompts.lengths import longer_than, without_tokens
from grpo.prompts.task import NO_TOKENS
from grpo.prompts.teacher_column import column_errors
from grpo.prompts.templates import TemplateHangs, render

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from grpo.prompts.parts import Share
    from grpo.prompts.task import Task


def check_before_loading(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    task: Task | None = None,
) -> list[str]:
    """Check a recipe against its tokenizer and its model's configuration; returns warnings about what may be meant.

    With ``task``, all its prompts are checked too, and with ``stage: sft`` its completions.

    Raises:
        UserError: every problem at once, one a line.
    """
    errors = [
        *_end_errors(recipe, tokenizer, model_config, generation_config),
        *_chat_errors(recipe.data, tokenizer, stop_token_ids(tokenizer, model_config, generation_config)),
    ]
    if task is not None and not errors:  # rows cannot be judged without a usable template and EOS
        limit = recipe.rollout.max_completion_length
        vocabulary = _text_config(model_config).vocab_size
        for share in (*task.train.shares, *task.held_out.shares):
            errors += _row_errors(task, share, limit, vocabulary)
        if task.teacher_column is not None and not errors:
            errors += [error for part in (task.train, task.held_out) for error in column_errors(task, part)]
    errors += [*_length_errors(recipe, model_config), *_rope_errors(recipe, model_config)]
    if errors:
        raise UserError("\n".join(errors))
    notes = [f"data: {note}" for note in task.notes] if task is not None else []
    stops = stop_token_ids(tokenizer, model_config, generation_config)
    return [
        *_end_warnings(recipe.rollout.stop, tokenizer, model_config, generation_config),
        *_tag_warnings(recipe, tokenizer, stops),
        *_chat_warnings(recipe.data, tokenizer),
        *notes,
    ]


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig, generation_config: GenerationConfig | None
) -> list[int]:
    """Tokens on which a rollout stops: the end-of-sequence tokens of tokenizer, model and generation config together.

    Instruct models often have several, and no one of the three files always lists them all.
    """
    return sorted(set().union(*_ends(tokenizer, model_config, generation_config)))


def _end_errors(recipe: Recipe, tokenizer: Any, model_config: Any, generation_config: Any) -> Iterator[str]:
    """Errors about completions that can never end."""
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


def _end_warnings(stop: list[str], tokenizer: Any, model_config: Any, generation_config: Any) -> Iterator[str]:
    """Warnings about stop tokens that disagree, and about a tokenizer with more tokens than the model."""
    own, model, generation = _ends(tokenizer, model_config, generation_config)
    if own and (model or generation) and not own & (generation or model):
        theirs = " and ".join(f"{token} ({_name(tokenizer, token)})" for token in sorted((model | generation) - own))
        yield (
            f"model: the tokenizer ends a text with {tokenizer.eos_token_id} ({tokenizer.eos_token}), the model's "
            f"configuration with {theirs}. Rollouts stop on any of them, supervised examples end with the tokenizer's. "
            f"If completions run into rollout.max_completion_length, name the tokenizer of the model's training "
            f"(model.tokenizer)"
        )
    if not (own or model or generation):
        yield f"model: no end-of-sequence token: completions end only on rollout.stop ({stop})"
    vocabulary = _text_config(model_config).vocab_size
    if len(tokenizer) > vocabulary:
        yield (
            f"model: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}: a text with one of the "
            f"tokens beyond that would fail. Do they belong together (model.tokenizer)?"
        )


def _length_errors(recipe: Recipe, model_config: Any) -> Iterator[str]:
    """An error where prompt and completion together may be longer than the model has positions."""
    positions = getattr(_text_config(model_config), "max_position_embeddings", None)
    prompt, rollout = recipe.data.max_prompt_length, recipe.rollout.max_completion_length
    lengths = {"rollout": rollout, "evaluation": recipe.evaluation.max_completion_length or rollout}
    if recipe.evaluation.suites:
        lengths["evaluation.suite_sampling"] = recipe.evaluation.suite_sampling.max_completion_length or rollout
    answers = recipe.environment.max_environment_tokens if recipe.environment is not None else 0
    theirs = f" + environment.max_turns times max_observation_length ({answers})" if answers else ""
    for section, completion in lengths.items():
        of_environment = 0 if section == "evaluation.suite_sampling" else answers
        if positions and prompt + completion + of_environment > positions:
            yield (
                f"data.max_prompt_length ({prompt}) + {section}.max_completion_length ({completion})"
                f"{theirs if of_environment else ''} is more than the {positions} positions of the model: lower one of "
                "them"
            )
            return


def _tag_warnings(recipe: Recipe, tokenizer: Any, stops: list[int]) -> Iterator[str]:
    """What becomes of ``<think>`` and ``<answer>`` where the tokenizer does not hold them as plain text."""
    if recipe.stage == "sft":
        return
    texts = CompletionText(tokenizer, stops)
    if kept := [tag for tag in TAGS if tag in texts.kept]:
        yield (
            f"model: {', '.join(kept)} {'is a special token' if len(kept) == 1 else 'are special tokens'} of the "
            "tokenizer; rewards see them as text all the same"
        )
    ends = [tag for tag in TAGS if tokenizer.convert_tokens_to_ids(tag) in stops]
    if ends and ends != ["</answer>"]:
        yield f"model: a completion ends on {', '.join(ends)}, a tag of its form: what comes behind it is never sampled"


def _rope_errors(recipe: Recipe, model_config: Any) -> Iterator[str]:
    """An error where rows may pass the length beyond which longrope has other factors for the whole batch. vLLM takes
    those for all rows, if its own limit is beyond."""
    config, longest = _text_config(model_config), recipe.longest_sequence()
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if part.get("rope_type") != "longrope":
            continue
        border = part.get("original_max_position_embeddings") or config.original_max_position_embeddings
        if longest > border:
            yield (
                f"data.max_prompt_length: prompt and completion may have {longest} tokens together. Beyond {border}, "
                "this model's longrope takes other factors for all rows of a batch, so the log-probabilities of one "
                "would depend on the rows beside it. Lower data.max_prompt_length, or max_completion_length of rollout "
                f"and evaluation: to {border} together"
            )
        elif (recipe.rollout.vllm_max_model_length or 0) > border:
            yield (
                f"rollout.vllm_max_model_length: beyond {border} tokens, vLLM takes longrope's long factors for all "
                "rows, and the update the short ones; lower it, or leave it out"
            )
        return


def _chat_errors(data: DataConfig, tokenizer: Any, stops: list[int]) -> Iterator[str]:
    """Errors about a chat template that does not exist, or that this model was not trained with."""
    for source in data.sources():
        yield from _chat_errors_of(source, tokenizer, stops)


def _chat_errors_of(source: Source, tokenizer: Any, stops: list[int]) -> Iterator[str]:
    data, key = source.rows, f"{source.where}.template"
    if data.template != "chat":
        return
    cure = (
        "This looks like a base model: take template: r1_zero, tinyzero or none, or the tokenizer of the instruct "
        "model (model.tokenizer)"
    )
    if not tokenizer.chat_template:
        yield f"{key}: chat, but the tokenizer has no chat template. {cure}"
        return
    try:
        text = _shown(data, tokenizer, TURN)
        if any(_shown(data, tokenizer, TURN) != text for _ in range(DRAWS)):
            yield f"{key}: the tokenizer's chat template shows the same conversation differently each time"
            return
    except TemplateHangs as error:
        yield f"{key}: {error}"
        return
    except Exception as error:  # a template is a program and may raise anything
        yield f"{key}: the tokenizer's chat template fails: {error}"
        return
    ending = text[text.rindex(ANSWER) + len(ANSWER) :] if ANSWER in text else ""
    if not set(tokenizer.encode(ending, add_special_tokens=False)) & set(stops):
        yield (
            f"{key}: the chat template ends an answer with {ending.strip()!r}, but the model stops on "
            f"{', '.join(_name(tokenizer, token) for token in stops) or 'nothing'}. {cure}"
        )


ANSWER = "An answer."
DRAWS = 20  # renderings in which a template that draws by chance shows that it does
TURN = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": ANSWER}]


def _shown(data: RowsConfig, tokenizer: Any, messages: list[dict[str, str]], **mode: Any) -> str:
    return render(messages, tokenizer, data.chat_template_date, **mode, **data.chat_template_kwargs)


def _chat_warnings(data: DataConfig, tokenizer: Any) -> Iterator[str]:
    """What a sound chat template does that may not be meant: it tells the date, or thinks for the model."""
    for source in data.sources():
        if source.rows.template == "chat":
            yield from _chat_warnings_of(source, tokenizer)


def _chat_warnings_of(source: Source, tokenizer: Any) -> Iterator[str]:
    data, where = source.rows, source.where
    asked: list[str] = []
    question = _shown(data, tokenizer, TURN[:1], add_generation_prompt=True, asked=asked.append)
    whole = _shown(data, tokenizer, TURN)
    if asked:
        yield (
            f"{where}.template: the chat template asks for today's date ({asked[0]}). It is told "
            f"{data.chat_template_date} ({where}.chat_template_date), so that prompts are the same tomorrow"
        )
    kwargs = f"{where}.chat_template_kwargs, such as {{enable_thinking: true}}, may turn that off"
    if EMPTY_THINKING.search(question):
        yield (
            f"{where}.template: the chat template puts an empty think block before every answer: the model is not to "
            f"think, and a reward for thinking finds none. {kwargs}"
        )
    elif EMPTY_THINKING.search(whole):
        yield (
            f"{where}.template: the chat template shows an answer behind an empty think block, with which neither "
            f"rollouts nor completions to imitate begin. {kwargs}"
        )


THOUGHT = r"[a-z_]*(?:think|thought|reason)[a-z_]*\|?[>\]▷]"
EMPTY_THINKING = re.compile(rf"[<\[◁]\|?{THOUGHT}\s*[<\[◁]\|?(?:/\|?|end){THOUGHT}", re.IGNORECASE)
"""``<think></think>``, ``[THINK][/THINK]``, ``<|begin_of_thought|><|end_of_thought|>`` and their like."""


def _row_errors(task: Task, part: Share, max_completion_length: int, vocabulary: int) -> Iterator[str]:
    """Errors about prompts (and completions to imitate) that are too long, or that a template was applied to before."""
    data, markers = part.data, _turn_markers(task.tokenizer)
    encode = partial(task.encode, data)
    prompts: dict[int, str] = {}
    completions: dict[int, str] = {}
    marked: dict[int, str] = {}
    refused: list[str] = []
    answers = part.values(data.completion_column) if task.stage == "sft" else None
    for row, question in part.values(data.prompt_column).items():
        try:
            prompts[row], prefill = task.render(part, question, row)
            if answers is not None:
                completions[row] = task.answer(part, question, answers[row], prefill, row)
        except TemplateHangs as error:  # so it would for other rows, each for as long
            yield f"data: {error}"
            return
        except UserError as error:
            refused.append(str(error))
        held = [marker for marker in markers if marker in str(question)]
        if held and data.template != "none":
            marked[row] = held[0]
    if refused:
        yield f"data: {len(refused)} of {len(part)} rows can't be used, the first is {refused[0]}"
    if empty := without_tokens(prompts, encode, special_tokens(task.tokenizer).values()):
        first = part.place(empty[0])
        yield f"data: {len(empty)} of {len(part)} rows can't be used, the first is {first}: {NO_TOKENS}"
    limit = task.data.max_prompt_length
    if too_long := longer_than(limit, prompts, task.tokenizer, encode):
        yield _too_long("data.max_prompt_length", limit, "prompts", too_long, part)
    if too_long := longer_than(max_completion_length, completions, task.tokenizer, task.encode_answer):
        yield _too_long(
            "rollout.max_completion_length", max_completion_length, "completions to imitate", too_long, part
        )
    if len(task.tokenizer) > vocabulary:
        yield from _unknown_to_the_model(task, part, prompts, completions, vocabulary)
    if marked:
        row, marker = next(iter(marked.items()))
        yield (
            f"data.template: {len(marked)} of {len(part)} prompts already hold a template's token, {marker} (first "
            f"{part.place(row)}); template: {data.template} would wrap them once more. Take template: none for "
            f"prompts that are rendered already, or take the tokens out"
        )


def _unknown_to_the_model(
    task: Task, part: Share, prompts: dict[int, str], completions: dict[int, str], vocabulary: int
) -> Iterator[str]:
    """An error where texts hold tokens that the model has no embedding for."""
    encoded = [(row, task.encode(part.data, text)) for row, text in prompts.items()]
    encoded += [(row, task.encode_answer(text)) for row, text in completions.items()]
    found = {row: max(ids) for row, ids in encoded if ids and max(ids) >= vocabulary}
    if found:
        row, token = next(iter(found.items()))
        yield (
            f"model.tokenizer: {len(found)} of {len(part)} rows hold tokens that the model has no embedding for, such "
            f"as {token} ({_name(task.tokenizer, token)}) in {part.place(row)}; the model has {vocabulary}. Name "
            "the tokenizer that belongs to the model, or enlarge the model (resize_token_embeddings) and save it"
        )


def _too_long(key: str, limit: int, what: str, found: dict[int, int], part: Share) -> str:
    row = max(found, key=lambda row: found[row])
    return (
        f"{key}: {len(found)} of {len(part)} {what} are longer than {limit} tokens; the longest has {found[row]} "
        f"({part.place(row)}). Raise it, or set data.too_long: drop to leave those rows out"
    )


def _turn_markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that a template or the tokenizer puts around texts. A question should not contain them."""
    source = str(tokenizer.chat_template or "")
    ends = {tokenizer.bos_token, tokenizer.eos_token}
    return sorted(token for token in tokenizer.all_special_tokens if token in ends or token in source)


def _text_config(model_config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's part of a configuration that may have other parts (vision)."""
    return model_config.get_text_config()


def _ends(tokenizer: Any, model_config: Any, generation_config: Any) -> tuple[set[int], set[int], set[int]]:
    """The end-of-sequence tokens of the tokenizer, of the model's config, and of its generation config."""

    def as_set(source: Any) -> set[int]:
        token_ids = getattr(source, "eos_token_id", None)
        if token_ids is None:
            return set()
        return {token_ids} if isinstance(token_ids, int) else set(token_ids)

    return as_set(tokenizer), as_set(_text_config(model_config)), as_set(generation_config)


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token)) if token < len(tokenizer) else "unknown to the tokenizer"

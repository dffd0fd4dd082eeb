"""A model evaluated outside of training, on a recipe's held-out rows and on suites: what ``grpo eval`` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.backends import check_engine, find_backend, make_backend, resolve_backend
from grpo.config import Recipe
from grpo.environments.episodes import Episodes
from grpo.environments.prepared import prepared
from grpo.errors import UserError, first_line
from grpo.evaluation.held_out import evaluate
from grpo.evaluation.suites import PreparedSuite, evaluate_suite, prepare, scorers, training_questions
from grpo.model.loading import load_configs, load_tokenizer
from grpo.model.policy import Policy
from grpo.prompts.checks import stop_token_ids
from grpo.prompts.rows import load_parts
from grpo.run.inputs import hash_model
from grpo.run.screen import working
from grpo.run.session import leave, make_accelerator, on_main, resolve_dtype
from grpo.scoring.scorer import Scorer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from grpo.prompts.task import Task

log = logging.getLogger("grpo")
NO_LIMIT = 1 << 20  # tokens, of a model that does not say how many positions it has


class Evaluated(NamedTuple):
    """An evaluation: its metrics and rows, the recipe by which it was made, with what ``auto`` stood for, what else its
    file says, and of a suite its name."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    recipe: Recipe
    facts: dict[str, Any]
    suite: str = ""


def evaluate_recipe(
    recipe: Recipe,
    model: str | None = None,
    *,
    held_out: bool = True,
    rows: str | None = None,
    choose_template: bool = False,
    data_known: bool = True,
    on_result: Callable[[Evaluated], None] = lambda evaluated: None,
) -> None:
    """Evaluate a recipe's model, or another one (a folder or hub id), on its held-out rows (``held_out``) and on its
    ``evaluation.suites``. Every process calls ``on_result`` with each evaluation as soon as it is made; a suite's is
    whole on the first one alone.

    ``rows`` is a file in place of the rows of the one suite. With ``choose_template`` the template is the tokenizer's
    chat template where there is one. ``data_known`` says that the model was trained on the recipe's rows: then it is
    said which questions of a suite these repeat. Raises UserError where there is nothing to evaluate on.
    """
    if model is not None:
        recipe = recipe.with_model(model)
    if held_out and not recipe.functions():
        raise UserError("rewards: the recipe has none, so there is nothing to judge answers by; give one, of weight 0")
    find_backend(recipe)
    accelerator = make_accelerator(recipe)
    recipe = resolve_backend(resolve_dtype(recipe, accelerator), accelerator)
    check_engine(recipe.rollout)
    task: Task | None = None
    episodes: Episodes | None = None
    with ExitStack() as stack:
        if held_out:
            tokenizer, stop_ids, task, episodes = stack.enter_context(prepared(recipe))
            if not task.eval_prompts and not recipe.evaluation.suites:
                raise UserError("data.eval_size is 0: there is nothing to evaluate on")
            configs = load_configs(recipe.model)
        else:
            tokenizer, configs = load_tokenizer(recipe.model), load_configs(recipe.model)
            stop_ids = stop_token_ids(tokenizer, *configs)
        if choose_template:
            template = "chat" if tokenizer.chat_template else "none"
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": template})})
        trained_on = _trained_on(recipe, task) if data_known and recipe.evaluation.suites else None
        suites = prepare(recipe, tokenizer, configs, _longest(recipe, configs[0]), rows, trained_on)
        scorer = stack.enter_context(Scorer(recipe.functions(), recipe.scoring)) if task is not None else None
        if task is not None and scorer is not None:
            scorer.check_columns(task.columns)
        of_suites = stack.enter_context(scorers(suites))
        engine = with_room(recipe, suites, held_out)
        policy = Policy(engine, accelerator, tokenizer, stop_ids, needs_reference=False)
        backend = stack.enter_context(closing(make_backend(engine, policy)))
        backend.sync(policy, 0)
        inputs = {"inputs": on_main(accelerator, lambda: hash_model(recipe.model))}
        if task is not None and scorer is not None and task.eval_prompts:
            found, completions = evaluate(
                recipe, task.eval_prompts, backend, scorer, accelerator, version=0, episodes=episodes
            )
            on_result(Evaluated(found, completions, recipe, inputs))
        for suite, judge in zip(suites, of_suites, strict=True):
            on_result(_evaluated(suite, backend, judge, accelerator, inputs))
    leave(accelerator, policy)


def _evaluated(
    suite: PreparedSuite, backend: Any, judge: Scorer, accelerator: Accelerator, inputs: dict[str, Any]
) -> Evaluated:
    title = f"{suite.suite.title}: {len(suite.prompts)} questions, {suite.recipe.evaluation.num_generations} each"
    with working(title, shown=accelerator.is_main_process):
        metrics, completions, facts = evaluate_suite(suite, backend, judge, accelerator, version=0)
    return Evaluated(metrics, completions, suite.recipe, facts | inputs, suite.name)


def _trained_on(recipe: Recipe, task: Task | None) -> list[str] | None:
    """The questions that a recipe trains on; None, with a line in the log, where its rows can't be had."""
    try:
        train = load_parts(recipe.data, recipe.training, recipe.stage).train if task is None else task.train
    except UserError as error:
        log.warning("the rows that the recipe trains on are not compared with the suites: %s", first_line(error))
        return None
    return training_questions(train)


def _longest(recipe: Recipe, config: Any) -> int:
    """Tokens that a prompt and its completion may have together."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT
    return min(positions, recipe.rollout.vllm_max_model_length or positions)


def with_room(recipe: Recipe, suites: list[PreparedSuite], held_out: bool) -> Recipe:
    """The recipe for the model and its engine, with lengths that fit all that is evaluated."""
    if not suites:
        return recipe
    prompts = [suite.recipe.data.max_prompt_length for suite in suites]
    completions = [suite.recipe.evaluation.max_completion_length or 1 for suite in suites]
    if held_out:
        prompts.append(recipe.data.max_prompt_length)
        completions.append(recipe.longest_sequence() - recipe.data.max_prompt_length)
    data = recipe.data.model_copy(update={"max_prompt_length": max(prompts)})
    longest = {"max_completion_length": max(completions)}
    evaluation, rollout = (part.model_copy(update=longest) for part in (recipe.evaluation, recipe.rollout))
    return recipe.model_copy(update={"data": data, "evaluation": evaluation, "rollout": rollout})

"""Evaluation suites: prepared, sampled, judged, and put into figures that say all they depend on.

A suite is evaluated as held-out rows are, by a recipe of its own: the model, engine and template of the recipe that
asks for it, and the suite's rows, reward and sampling.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from grpo.backends.base import Backend
from grpo.config import EvaluationConfig, Recipe, RewardConfig
from grpo.config.suites import Suite, SuiteSampling, find_suite, is_file
from grpo.errors import UserError
from grpo.evaluation.held_out import held_out_metrics, judged_groups, sample_and_score
from grpo.evaluation.statistics import clustered_interval, ks, maj_at_k, pass_at_k
from grpo.metrics import rollout_rows
from grpo.prompts.checks import check_before_loading
from grpo.prompts.overlap import find_overlaps, question_text
from grpo.prompts.parts import Part
from grpo.prompts.suite import LoadedSuite, is_bare, load_suite, suite_prompts, suite_questions, suite_task
from grpo.run.inputs import rows_hash
from grpo.run.secrets import recipe_without_secrets
from grpo.scoring.functions import Vote, voter
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Prompt

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("grpo")


@dataclass(frozen=True)
class PreparedSuite:
    """A suite that is ready to be sampled. ``recipe`` is the one by which it is, ``facts`` what the result says of its
    rows, prompt and source."""

    name: str
    suite: Suite
    recipe: Recipe
    prompts: list[Prompt]
    facts: dict[str, Any]


class SuiteResult(NamedTuple):
    """Metrics under the names of an evaluation, the completions, and all that the result's file says."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    facts: dict[str, Any]


# --- before any weights are loaded -----------------------------------------------------------------------------------


def name_of(suite: str) -> str:
    """What a suite is called in files and metrics: its name, or that of the file it is in."""
    return Path(suite).stem if is_file(suite) else suite


def prepare(
    recipe: Recipe,
    tokenizer: Any,
    configs: tuple[Any, Any],
    longest: int,
    rows: str | None = None,
    trained_on: Sequence[str] | None = None,
) -> list[PreparedSuite]:
    """The suites of ``evaluation.suites``. ``longest`` bounds a prompt and its completion together; ``rows`` is a file
    in place of the rows of the one suite; ``trained_on`` are the questions that the model is trained on, where they are
    known. ``configs`` are the model's and that of generation.

    Raises UserError where rows can't be had or used, or a prompt is too long.
    """
    if rows is not None and len(recipe.evaluation.suites) != 1:
        raise UserError("--rows is the file of one suite: name one with --suite")
    prepared = []
    for given in recipe.evaluation.suites:
        suite, most = find_suite(given), recipe.evaluation.suite_sampling.rows
        loaded = load_suite(name_of(given), suite, recipe.training.seed, rows, most)
        if loaded.note:
            log.warning("suite %s: %s", loaded.name, loaded.note)
        ready = _prepared(loaded, recipe, tokenizer, configs, longest)
        ready.facts["contamination"] = contamination(loaded, trained_on)
        prepared.append(ready)
    return prepared


def training_questions(train: Part) -> list[str]:
    """The questions that a run trains on."""
    return [question_text(q) for share in train.shares for q in share.values(share.data.prompt_column).values()]


def contamination(loaded: LoadedSuite, trained_on: Sequence[str] | None) -> dict[str, Any]:
    """Which of a suite's questions rows to train on repeat (``prompts/overlap.py``); a line in the log where any do."""
    if trained_on is None:
        return {"checked": False, "why": "the rows that the model was trained on are not known here"}
    questions = suite_questions(loaded)
    found = find_overlaps(trained_on, questions).found
    repeated = sorted({one.question for one in found})
    if repeated:
        log.warning(
            "suite %s: %d of its %d questions are repeated by rows that are trained on, such as %.60r",
            loaded.name, len(repeated), len(questions), questions[repeated[0]],
        )  # fmt: skip
    return {
        "checked": True,
        "trained_on": len(trained_on),
        "repeated": len(repeated),
        "how": dict(sorted(Counter(one.how for one in found).items())),
        "prompt_ids": repeated,
    }


def _prepared(
    loaded: LoadedSuite, recipe: Recipe, tokenizer: Any, configs: tuple[Any, Any], longest: int
) -> PreparedSuite:
    recipe = _in_one_template(recipe)
    with_room = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_prompt_length": longest})})
    task = suite_task(loaded, with_room, tokenizer)
    prompts = suite_prompts(task, loaded, recipe)
    prompt_tokens = max(len(prompt.token_ids) for prompt in prompts)
    room = longest - prompt_tokens
    if room < 1:
        raise UserError(
            f"suite {loaded.name}: its longest prompt has {prompt_tokens} tokens, and prompt and completion may have "
            f"{longest} together: the model's positions or, during a run, data.max_prompt_length and "
            "max_completion_length"
        )
    sampling, wanted = _sampling(loaded.suite, recipe)
    own = _recipe(loaded, recipe, sampling.model_copy(update={"max_completion_length": min(wanted, room)}))
    own = own.model_copy(update={"data": own.data.model_copy(update={"max_prompt_length": prompt_tokens})})
    if wanted > room:
        log.warning(
            "suite %s: completions have at most %d tokens, not %d: its longest prompt has %d, and there is room for %d",
            loaded.name, room, wanted, prompt_tokens, longest,
        )  # fmt: skip
    for warning in check_before_loading(own, tokenizer, *configs, task):
        log.warning("suite %s: %s", loaded.name, warning)
    facts = _facts(loaded, own, prompts) | {"max_completion_length_wanted": wanted}
    return PreparedSuite(loaded.name, loaded.suite, own, prompts, facts)


def _in_one_template(recipe: Recipe) -> Recipe:
    """The recipe with the template of its first source, if it has several."""
    first = recipe.data.sources()[0].rows
    keys = ("template", "system_prompt", "chat_template_kwargs", "chat_template_date")
    changes = {"mix": [], **{key: getattr(first, key) for key in keys}}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)}) if recipe.data.mix else recipe


def _sampling(suite: Suite, recipe: Recipe) -> tuple[SuiteSampling, int]:
    """The suite's sampling with what takes its place, and the tokens that it wants for a completion."""
    given = recipe.evaluation.suite_sampling
    changes = {key: value for key, value in given.model_dump().items() if value is not None and key != "rows"}
    if changes.get("temperature") == 0:
        changes.setdefault("num_generations", 1)
    sampling = suite.sampling.model_copy(update=changes)
    if sampling.temperature == 0 and sampling.num_generations > 1:
        raise UserError(
            f"suite {suite.title}: it is sampled greedily, so its {sampling.num_generations} completions would all be "
            "the same; set evaluation.suite_sampling.temperature too"
        )
    if suite.bare is not None and is_bare(suite, recipe):
        sampling = sampling.model_copy(update={"stop": suite.bare.stop})
    return sampling, sampling.max_completion_length


def _recipe(loaded: LoadedSuite, recipe: Recipe, sampling: SuiteSampling) -> Recipe:
    """The recipe by which the suite is evaluated."""
    suite, source = loaded.suite, loaded.suite.rows
    reward = suite.reward
    if is_bare(suite, recipe) and suite.bare is not None and suite.bare.continues:
        reward = reward.model_copy(update={"args": {**reward.args, "continues": sampling.stop}})
    place: dict[str, Any] = {"name": source.task, "path": source.path, "hub": source.hub, "args": source.args}
    data = recipe.data.model_copy(update=place | {"eval_path": None, "prompt_column": "prompt", "mix": []})
    evaluation = EvaluationConfig(
        num_generations=sampling.num_generations,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_completion_length=sampling.max_completion_length,
    )
    length = {"max_completion_length": sampling.max_completion_length}
    rollout = recipe.rollout.model_copy(update=length | {"stop": [*sampling.stop, *recipe.rollout.stop]})
    changes = {"data": data, "rewards": [reward], "evaluation": evaluation, "rollout": rollout, "stage": "grpo"}
    changes["environment"] = None  # which a suite does not have
    return recipe.model_copy(update=changes)


def _facts(loaded: LoadedSuite, recipe: Recipe, prompts: list[Prompt]) -> dict[str, Any]:
    suite, data = loaded.suite, recipe.data
    bare = suite.bare if is_bare(suite, recipe) else None
    return {
        "suite": loaded.name,
        "title": suite.title,
        "source": suite.source,
        "rows": {
            "from": loaded.rows.source,
            "hub": suite.rows.hub,
            "revision": loaded.revision or None,
            "pinned": bool(loaded.revision) and loaded.revision == suite.rows.revision,
            "count": len(loaded.rows),
            "sha256": rows_hash(loaded.rows),
            "note": loaded.note or None,
        },
        "prompt": {
            "template": data.template,
            "question": bare.question if bare else suite.question,
            "answer_begins": suite.answer_begins if data.template == "chat" else "",
            "system_prompt": data.system_prompt,
            "chat_template_kwargs": data.chat_template_kwargs,
            "first": prompts[0].text,
        },
        "verifier": recipe_without_secrets(recipe)["rewards"][0],
    }


@contextmanager
def scorers(prepared: list[PreparedSuite]) -> Iterator[list[Scorer]]:
    """What scores each suite. Suites with the same reward share its processes."""
    with ExitStack() as stack:
        opened: list[tuple[RewardConfig, Scorer]] = []
        for suite in prepared:
            reward = suite.recipe.rewards[0]
            if all(reward != known for known, _ in opened):
                opened.append((reward, stack.enter_context(Scorer([reward], suite.recipe.scoring))))
        found = [next(s for known, s in opened if known == suite.recipe.rewards[0]) for suite in prepared]
        for suite, scorer in zip(prepared, found, strict=True):
            scorer.check_columns({"": list(suite.prompts[0].columns)})
        yield found


# --- sampled and judged ----------------------------------------------------------------------------------------------


def evaluate_suite(
    prepared: PreparedSuite,
    backend: Backend,
    scorer: Scorer,
    accelerator: Accelerator,
    *,
    version: int,
    tell: Callable[[int], None] = lambda done: None,
) -> SuiteResult:
    """Sample and judge a suite. Every process calls it and does its share; the first one's result counts, since a
    verifier that is late on one may not be on another."""
    recipe = prepared.recipe
    draws = (prepared.name,)
    groups = sample_and_score(
        recipe, prepared.prompts, backend, scorer, accelerator, version=version, tell=tell, draws=draws
    )
    if not accelerator.is_main_process:
        return SuiteResult({}, [], {})
    metrics = held_out_metrics(recipe, groups)
    votes = _votes(prepared, groups)
    metrics |= {f"eval/maj@{k}": float(np.mean(values)) for k, values in votes.items()}
    name = recipe.judged_by()
    verdicts: Counter[str] = Counter()
    for group in groups:
        verdicts.update(group.verdicts.get(name, {}))
    facts = prepared.facts | _figures(prepared, groups, votes) | {"verdicts": dict(sorted(verdicts.items()))}
    return SuiteResult(metrics, rollout_rows(groups, version), facts)


def _figures(prepared: PreparedSuite, groups: list[Group], votes: dict[int, list[float]]) -> dict[str, Any]:
    """avg@n, pass@k and maj@k, each with its 95% interval clustered by question."""
    scored, solved_PG = judged_groups(prepared.recipe, groups)
    questions = [str(group.prompt.prompt) for group in scored]
    G = solved_PG.shape[1]

    def figure(values_P: Any) -> dict[str, float]:
        values_P = np.asarray(values_P, dtype=float)
        low, high = clustered_interval(values_P[:, None], questions)
        return {"value": float(values_P.mean()), "low": low, "high": high}

    solved_P = solved_PG.sum(1)
    return {
        f"avg@{G}": figure(solved_PG.mean(1)),
        "pass@k": {str(k): figure([pass_at_k(int(solved), G, k) for solved in solved_P]) for k in ks(G)},
        "maj@k": {str(k): figure(values) for k, values in votes.items()} or None,
        "ties": "where answers are level, one is drawn: the expectation over the draw is told" if votes else None,
    }


def _votes(prepared: PreparedSuite, groups: list[Group]) -> dict[int, list[float]]:
    """maj@k of each question, by k; none where completions can't be counted as votes."""
    vote = voter(prepared.recipe.rewards[0])
    scored, solved_PG = judged_groups(prepared.recipe, groups)
    G = solved_PG.shape[1]
    if vote is None or G < 2:
        return {}
    wrong = [_wrong_answers(vote, group, solved) for group, solved in zip(scored, solved_PG, strict=True)]
    pairs = list(zip(solved_PG.sum(1).tolist(), wrong, strict=True))
    return {k: [maj_at_k(right, counts, G, k) for right, counts in pairs] for k in ks(G)}


def _wrong_answers(vote: Vote, group: Group, solved_G: Any) -> tuple[int, ...]:
    """How many of a group's completions gave each wrong answer, the most frequent first."""
    wrong = [c for c, solved in zip(group.completions, solved_G, strict=True) if not solved]
    said = vote([c.text for c in wrong], [group.prompt.prefill] * len(wrong), [c.status.value for c in wrong])
    return tuple(sorted(Counter(answer for answer in said if answer is not None).values(), reverse=True))

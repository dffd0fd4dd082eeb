"""What a step has to compute: tokens, and floating-point operations, from the recipe and the model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from grpo.config import Recipe
from grpo.model.shape import Shape


@dataclass(frozen=True)
class Lengths:
    """What nobody knows before a run, in tokens and as a share: mean prompt and completion, the longest completion, how
    many groups have a signal (the others are not trained on), and what an environment adds to a completion on average.
    """

    prompt: float
    completion: float
    longest: int
    with_signal: float = 1.0
    environment: float = 0.0


def assumed_lengths(
    recipe: Recipe,
    *,
    prompt: float | None,
    completion: float | None,
    with_signal: float | None,
    environment: float | None = None,
) -> Lengths:
    """As given; else prompts, completions and an environment's answers half as long as they may be, and a signal in
    every group."""
    longest = recipe.rollout.max_completion_length
    mean = longest / 2 if completion is None else min(completion, longest)
    of_prompt = recipe.data.max_prompt_length / 2 if prompt is None else prompt
    answers = 0 if recipe.environment is None else recipe.environment.max_environment_tokens
    added = answers / 2 if environment is None else min(environment, answers)
    return Lengths(of_prompt, mean, longest, 1.0 if with_signal is None else with_signal, added)


@dataclass(frozen=True)
class Work:
    """Of one step, over all processes. Tokens are those of prompts (once each) and those drawn. What an environment
    adds is read like a prompt, a completion at a time: its operations are in both numbers of them."""

    prompts: int
    completions: int
    prompt_tokens: float
    completion_tokens: float
    update_flops: float
    prefill_flops: float


def work_of_step(recipe: Recipe, shape: Shape, lengths: Lengths, teacher: Shape | None = None) -> Work:
    P = recipe.training.prompts_per_step
    G = recipe.rollout.num_generations if recipe.stage == "grpo" else 1
    prompt_tokens, completion_tokens = P * lengths.prompt, P * G * lengths.completion
    forward = _forward_flops(shape, lengths, P, G)
    signal = lengths.with_signal if recipe.stage == "grpo" and recipe.teacher is None else 1.0
    # A pass through the teacher, whose head is computed once more for the slope.
    taught = 0.0 if teacher is None else _forward_flops(teacher, lengths, P, G)
    taught += 0.0 if teacher is None else 2.0 * teacher.embedding * completion_tokens
    return Work(
        prompts=P,
        completions=P * G,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        update_flops=forward * _passes(recipe) * signal + taught * recipe.algorithm.num_iterations,
        prefill_flops=2.0 * shape.products_of_token * (prompt_tokens + P * G * lengths.environment),
    )


def _forward_flops(shape: Shape, lengths: Lengths, P: int, G: int) -> float:
    """A forward pass over a step, a prompt once for its completions. The head sees completion tokens alone."""
    p, c, read = lengths.prompt, lengths.completion, lengths.completion + lengths.environment
    seen = p * p / 2 + G * read * (p + read / 2)
    attention = 4.0 * shape.layers * shape.attention_width * seen  # two products over the tokens before
    products = 2.0 * (shape.products_of_token * (p + G * read) + shape.embedding * G * c)
    return P * (products + attention)


def _passes(recipe: Recipe) -> float:
    """How many times a forward pass's operations an update costs: the backward pass takes two, or one where most
    weights are frozen; checkpointing, old log-probabilities and the reference one each."""
    model, algorithm = recipe.model, recipe.algorithm
    backward = 1.0 if model.lora else 2.0
    once = 1.0 + backward + (1.0 if model.gradient_checkpointing else 0.0)
    if recipe.stage != "grpo":
        return once
    updates = algorithm.num_iterations * algorithm.num_minibatches
    before = 1.0 if updates > 1 else 0.0
    reference = 1.0 if algorithm.beta > 0 else 0.0
    return once * algorithm.num_iterations + before + reference

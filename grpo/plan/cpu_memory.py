"""Memory of the training process on a CPU, by part, at its two peaks. Bytes; without torch."""

from __future__ import annotations

from grpo.config import Recipe
from grpo.model.memory_budget import Budget, teacher_bytes, weights_of
from grpo.model.shape import Shape
from grpo.plan.work import Lengths

LIBRARIES = 0.50e9  # what a training process holds before it has a model, measured
LOGIT_CHUNK = 8 << 20  # numbers of logits, computed at once and as many kept: devices.LOGITS["cpu"]
KEPT_AT_MOST, TOKENS_AT_MOST = (
    0.75e9,
    8192,
)  # of a micro-batch of automatic size: devices.LARGEST["cpu"]
SHORT_PROMPT = 32  # tokens; sequences begin with a copy of a prompt up to here: kv_cache.SHORT_PROMPT


def cpu_budget(
    recipe: Recipe, shape: Shape, lengths: Lengths, *, compute: str, rows: float, teacher: Shape | None = None
) -> Budget:
    """``compute`` is float32 or bfloat16, as ``model.dtype`` resolves on the machine; ``rows`` are the bytes of the
    recipe's rows."""
    size = 4 if compute == "float32" else 2
    model = recipe.model
    weights, trained, each = weights_of(recipe, shape, frozen=size)
    state = 8.0 if recipe.optimizer.optim == "adamw_torch" else 2.0
    reference = shape.parameters * size * (recipe.stage == "grpo" and recipe.algorithm.beta > 0 and not model.lora)
    held = {
        "libraries": LIBRARIES,
        "rows": rows,
        "weights": weights,
        "AdamW": trained * state,
        "reference": float(reference),
        "teacher": teacher_bytes(recipe, teacher, usual=size),
    }
    kept = shape.kept_token(checkpointing=model.gradient_checkpointing, size=size)
    update = held | {
        "gradients": float(trained * each),
        "cast weights": shape.parameters * 2.0 * (size == 2 and not model.lora),
        "activations": kept * _tokens(recipe, kept, lengths),
        "logits": 4.0 * 2 * LOGIT_CHUNK * (2 if teacher is not None else 1),
    }
    return Budget(update, held | _engine(recipe, shape, size) if recipe.stage == "grpo" else {}, {})


def _tokens(recipe: Recipe, kept: float, lengths: Lengths) -> float:
    """Of a micro-batch: as many as one may have, or as the step has."""
    found = recipe.training.micro_batch_tokens
    if found is None:
        found = 1 << (int(min(TOKENS_AT_MOST, KEPT_AT_MOST / kept)).bit_length() - 1)
    completions = recipe.rollout.num_generations if recipe.stage == "grpo" else 1
    minibatches = recipe.algorithm.num_minibatches if recipe.stage == "grpo" else 1
    of_step = (
        recipe.training.prompts_per_step
        * (lengths.prompt + completions * (lengths.completion + lengths.environment))
        / minibatches
    )
    return min(found, of_step)


def _engine(recipe: Recipe, shape: Shape, size: int) -> dict[str, float]:
    rollout = recipe.rollout
    rows = max(recipe.training.prompts_per_step * rollout.num_generations, recipe.data.held_out())
    rows = min(rows, rollout.max_batch_size)
    prompt = recipe.data.max_prompt_length
    answers = 0 if recipe.environment is None else recipe.environment.max_environment_tokens
    longest = rollout.max_completion_length + answers
    tokens = rows * (longest + (prompt if prompt <= SHORT_PROMPT else 0)) + rows * prompt / 2
    has_copy = size == 2 and recipe.model.weights == "float32" and not recipe.model.lora
    return {
        "copy": shape.parameters * 2.0 * has_copy,
        "packed copy": float((shape.linears + shape.embedding) * size),  # as the products of a few rows read it
        "keys and values": tokens * shape.kv_token * size / 2,
    }

"""GRPO in one file: read this first.

A tiny language model (0.85 M parameters, ``data/tiny_base``) gets countdown tasks such as ``6 3 9 = 27``: write an
expression that equals 27 and uses each of 6, 3 and 9 once. It samples several answers to a task. A rule says which are
right. Answers that beat the mean of their group become more likely, the others less. Nothing else teaches it.

    python examples/minimal_grpo.py             # a minute or two on two CPU cores

It needs torch and transformers, and prints the share of held-out tasks that the model solves, before and after.

The algorithm is GRPO (DeepSeekMath, arXiv:2402.03300). It deviates from the paper in five ways:

* One update follows each sampling. The policy that learns is then the one that sampled, the paper's ratio is 1, and
  its clip range never acts.
* The loss is the mean over all tokens of the step (DAPO, arXiv:2503.14476). The paper takes the mean over each
  completion first, which makes a token of a long completion count less.
* There is no KL penalty towards the first model.
* The standard deviation gets 1e-4 added, so that a group of nearly equal rewards cannot explode.
* Gradients are clipped to norm 1, and the learning rate is constant.

What the framework adds, by its rooms in ``grpo/`` and beside it:

    config/                every number below is a key of a YAML recipe, checked before anything loads
    prompts/, data/        data sets and files, chat templates, an order of prompts that a resumed run continues exactly
    backends/, rollout/    sampling by vLLM or by a faster engine here; groups drawn again or replayed
    scoring/, rewards/     rewards for math, code and format, or your own, in processes that cannot hang the run
    advantages, losses/    the variants of advantage and loss, each checked against its paper
    update/                micro-batches as large as memory allows; several processes give the gradient of one
    model/, kernels/       LoRA, a reference model, other optimizers, bfloat16; faster code for the same numbers
    evaluate, report/      accuracy with its interval, pass@k, a page of curves
    run/, audit/           checkpoints and exact resume, metrics and trackers; checks of rows and rewards before a run
    sft                    the supervised start that this tiny model has had

``recipes/demo_cpu.yaml`` is this task in the framework.
"""

from __future__ import annotations

import argparse
import ast
import operator
import random
import re
import time
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement, permutations
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Names of tensors end in their dimensions:
#   P  tasks in a step    G  completions of a task (a group)    B = P * G  completions in a step
#   T  tokens of a completion    N  tokens of a prompt, here always 5    V  vocabulary

MODEL = Path(__file__).resolve().parents[1] / "data" / "tiny_base"
Task = tuple[list[int], int]  # the numbers, and the target

# --- The tasks: three numbers of 1..9 and a target of 1..60 that they can reach --------------------------------------


def make_tasks() -> tuple[list[Task], list[Task]]:
    """All tasks that have a solution, in random order: those to train on, and those held out."""
    draw, training, held_out = random.Random(0), [], []
    for nums in combinations_with_replacement(range(1, 10), 3):
        for target in range(1, 61):
            if target in reachable(nums):
                (held_out if is_held_out(nums, target) else training).append((draw.sample(nums, 3), target))
    draw.shuffle(training)
    draw.shuffle(held_out)
    return training, held_out


@cache
def reachable(nums: tuple[int, ...]) -> set[Fraction]:
    """Every value of (a . b) . c and a . (b . c), in all orders of the three numbers and with all operators."""
    values = set()
    for a, b, c in permutations(map(Fraction, nums)):
        values |= {value for ab in results(a, b) for value in results(ab, c)}
        values |= {value for bc in results(b, c) for value in results(a, bc)}
    return values


def results(a: Fraction, b: Fraction) -> list[Fraction]:
    return [a + b, a - b, a * b] + ([a / b] if b else [])


def is_held_out(nums: tuple[int, ...], target: int) -> bool:
    """One task in three, by a hash of it (SplitMix64). ``data/countdown.py`` has the same rule, so the supervised start
    of the tiny model has seen none of these either."""
    state = 0
    for part in (1, *sorted(nums), target):
        state = (state ^ part) + 0x9E3779B97F4A7C15 & 2**64 - 1
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 2**64 - 1
        state ^= state >> 31
    return state % 3 == 0


def prompt_of(task: Task) -> str:
    return f"{' '.join(map(str, task[0]))} = {task[1]}"


# --- The reward: 1 for a right answer, else 0 ------------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def reward_of(completion: str, task: Task) -> float:
    """1.0 where the one ``<answer>`` is an expression that equals the target and uses each number once, else 0.0.

    The answer is the model's output, so it is parsed and computed in exact fractions, and never executed.
    """
    nums, target = task
    answers = re.findall(r"<answer>([-+*/() 0-9]{1,200})</answer>", completion)
    if len(answers) != 1:
        return 0.0
    used: list[int] = []
    try:
        value = value_of(ast.parse(answers[0].strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0
    return float(value == target and sorted(used) == sorted(nums))


def value_of(node: ast.AST, used: list[int]) -> Fraction:
    """The value of a parsed expression; its numbers are added to ``used``. Raises ValueError for other syntax."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left, used), value_of(node.right, used))
    raise ValueError(f"not a number, + - * / or a parenthesis: {ast.dump(node)}")


# --- Sampling, advantages, loss --------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: torch.nn.Module, prompts_BN: torch.Tensor, max_tokens: int, eos: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A completion of each prompt at temperature 1: tokens (B,T), and a mask (B,T) that is 1.0 up to its end token."""
    tokens_BT = torch.full((len(prompts_BN), max_tokens), eos)
    rows, input_ids, cache = torch.arange(len(prompts_BN)), prompts_BN, None  # rows: those that have not ended
    for t in range(max_tokens):
        out = model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values  # the keys and values of earlier tokens, so that only the newest token goes in
        next_tokens = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=draw)[:, 0]
        tokens_BT[rows, t] = next_tokens
        alive = (next_tokens != eos).nonzero()[:, 0]
        if not len(alive):
            break
        rows, input_ids = rows[alive], next_tokens[alive, None]
        cache.batch_select_indices(alive)
    ended_BT = (tokens_BT == eos).int()
    return tokens_BT, (ended_BT.cumsum(1) - ended_BT == 0).float()


def advantages_of(rewards_PG: torch.Tensor) -> torch.Tensor:
    """How much better a completion is than its group, in standard deviations. A group of equal rewards gets zeros."""
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)


def logprobs_of(model: torch.nn.Module, prompts_BN: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The log-probability (B,T) of each token, given its prompt and the tokens before it."""
    logits = model(input_ids=torch.cat([prompts_BN, tokens_BT], dim=1)).logits
    logits_BTV = logits[:, prompts_BN.shape[1] - 1 : -1]  # the logits at one place predict the token at the next
    return logits_BTV.log_softmax(-1).gather(2, tokens_BT[:, :, None])[:, :, 0]


def backward(
    model: torch.nn.Module,
    prompts_BN: torch.Tensor,
    tokens_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    advantages_PG: torch.Tensor,
) -> float:
    """Add the gradient of the step's loss to the model's; returns the loss.

    The loss is -mean(ratio * advantage) over the tokens of all groups. The ratio pi / pi_old is 1 in value, because the
    policy has not moved since it sampled; its gradient is that of log pi.
    """
    P, G = advantages_PG.shape
    total = 0.0
    for p in range(P):  # one group at a time, which needs less memory
        if not advantages_PG[p].any():
            continue  # no answer beats another: the gradient is zero
        rows = slice(p * G, (p + 1) * G)
        T = int(mask_BT[rows].sum(1).max())
        logps_GT = logprobs_of(model, prompts_BN[rows], tokens_BT[rows, :T])
        ratio_GT = (logps_GT - logps_GT.detach()).exp()
        loss = -(ratio_GT * advantages_PG[p, :, None] * mask_BT[rows, :T]).sum() / mask_BT.sum()
        loss.backward()
        total += loss.item()
    return total


# --- Training --------------------------------------------------------------------------------------------------------


def train(
    seed: int = 0,
    steps: int = 20,
    tasks_per_step: int = 8,
    group_size: int = 16,
    max_tokens: int = 160,
    learning_rate: float = 3e-4,
) -> tuple[float, float]:
    """Train, print, and return the share of held-out tasks solved before and after."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    training, held_out = make_tasks()
    draw, shuffled = torch.Generator().manual_seed(seed), random.Random(seed)

    def attempt(tasks: list[Task]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[float]]:
        """One completion a task: prompts (B,N), tokens and mask (B,T), rewards."""
        prompts_BN = torch.tensor(tokenizer([prompt_of(task) for task in tasks]).input_ids)
        tokens_BT, mask_BT = sample(model, prompts_BN, max_tokens, tokenizer.eos_token_id, draw)
        texts = [tokenizer.decode(row[mask > 0]) for row, mask in zip(tokens_BT, mask_BT, strict=True)]
        return prompts_BN, tokens_BT, mask_BT, [reward_of(text, task) for text, task in zip(texts, tasks, strict=True)]

    before = sum(attempt(held_out)[-1]) / len(held_out)
    print(f"before: {before:.3f} of {len(held_out)} held-out tasks solved")
    for step in range(1, steps + 1):
        start = time.perf_counter()
        tasks = shuffled.sample(training, tasks_per_step)
        prompts_BN, tokens_BT, mask_BT, rewards = attempt([task for task in tasks for _ in range(group_size)])
        rewards_PG = torch.tensor(rewards).view(tasks_per_step, group_size)
        loss = backward(model, prompts_BN, tokens_BT, mask_BT, advantages_of(rewards_PG))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(
            f"step {step:2d}/{steps}  reward {rewards_PG.mean():.3f}  mean length {mask_BT.sum(1).mean():5.1f}  "
            f"loss {loss:+.4f}  grad norm {grad_norm:.2f}  {time.perf_counter() - start:.1f} s"
        )
    after = sum(attempt(held_out)[-1]) / len(held_out)
    print(f"after: {after:.3f} of {len(held_out)} held-out tasks solved, {before:.3f} before")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GRPO in one file: a tiny model learns countdown.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    train(arguments.seed, arguments.steps)

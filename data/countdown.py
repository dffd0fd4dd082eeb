"""Countdown: reach a target with the given numbers, each used exactly once, by ``+ - * /``.

The defaults are those of Countdown-Tasks-3to4, TinyZero's data set: 3 or 4 numbers of 1..99, targets 10..100. As in the
generator behind it (Stream of Search, arXiv:2404.03683), numbers and target are drawn uniformly, and a pair without a
solution is thrown away. So tasks are uniform among the solvable tasks of equally many numbers. Two deviations:
fractions may occur on the way (``8 / (3 - 8 / 3)``), and no task (multiset of numbers with target) comes twice.

All randomness is a hash of the arguments. A task's own hash alone decides its split, whatever the seed, size or range:
no run trains on a task that another run holds out. Row ``i`` of a split depends on the seed and the range, never on how
many rows were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, combinations_with_replacement, count, islice
from math import comb
from typing import Any, Literal, NamedTuple

import numpy as np

from data.dataset import builds_dataset

Split = Literal["train", "eval"]
Task = tuple[list[int], int]  # numbers in the order shown, target

DEFAULT_SIZE = {"train": 16_384, "eval": 1_024}
EVAL_SHARE = 3  # one task in 3 is held out: the smallest ranges have few tasks, and an evaluation needs hundreds
ENUMERATE_UP_TO = 250_000  # pairs of multiset and target; above it tasks are drawn at random
CANDIDATES = {2: 4096, 3: 4096, 4: 1024, 5: 64, 6: 4}  # drawn at once, by the number of numbers
GIVE_UP_AFTER = 100_000  # candidates in a row without a new task

QUESTIONS = {
    "tinyzero": (
        "Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic operations "
        "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the "
        "final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
    ),
    "compact": "{spaced} = {target}",
}


def rows(
    split: Split,
    size: int | None = None,
    seed: int = 0,
    *,
    min_numbers: int = 3,
    max_numbers: int = 4,
    min_number: int = 1,
    max_number: int = 99,
    min_target: int = 10,
    max_target: int = 100,
    question: str = "tinyzero",
) -> list[dict[str, Any]]:
    """Rows of solvable tasks: ``prompt`` (the question), ``nums`` (list of integers), ``target``.

    ``size`` None gives ``DEFAULT_SIZE`` rows, or all there are. ``question`` is ``tinyzero`` (its words) or ``compact``
    (``6 3 9 = 27``). Each row has ``min_numbers`` to ``max_numbers`` numbers. Counts are equally frequent until one has
    no more tasks. Raises ValueError for a range that makes no sense, or that holds fewer distinct tasks than asked for.
    """
    if split not in DEFAULT_SIZE:
        raise ValueError(f"split is train or eval, not {split!r}")
    if question not in QUESTIONS:
        raise ValueError(f"question is one of {', '.join(QUESTIONS)}, not {question!r}")
    _check_range("numbers", min_numbers, max_numbers, lowest=2, highest=max(CANDIDATES))
    _check_range("number", min_number, max_number, lowest=1)
    _check_range("target", min_target, max_target, lowest=1)
    if max_target * (2 * max_number) ** max_numbers >= 2**62:
        raise ValueError(f"{max_numbers} numbers up to {max_number} can exceed 64-bit integers: lower one of them")

    limits = _Limits(min_number, max_number, min_target, max_target)
    sources = [_tasks(split, seed, n, limits) for n in range(min_numbers, max_numbers + 1)]
    wanted = DEFAULT_SIZE[split] if size is None else size
    tasks = list(islice(_interleave(sources, seed), wanted))
    if size is not None and len(tasks) < size:
        raise ValueError(
            f"countdown has only {len(tasks)} distinct {split} tasks for {min_numbers} to {max_numbers} numbers of "
            f"{min_number}..{max_number} and targets {min_target}..{max_target}, {size} were asked for: "
            f"widen the range, or ask for fewer"
        )
    template = QUESTIONS[question]
    return [
        {"prompt": template.format(nums=n, spaced=" ".join(map(str, n)), target=t), "nums": n, "target": t}
        for n, t in tasks
    ]


build = builds_dataset(rows)


def solutions(nums: list[int], target: int) -> Iterator[str]:
    """Every expression that uses each of ``nums`` exactly once and equals ``target``, as text, without repeats.

    Lazy: ``next(solutions(nums, target), None)`` stops at the first. As in the game no difference is negative, which
    loses no target; fractions are allowed. Parentheses only where they are needed.
    """
    seen: set[str] = set()
    for value, text, _ in _expressions([(Fraction(n), str(n), _ATOM) for n in nums]):
        if value == target and text not in seen:
            seen.add(text)
            yield text


# --- expressions of one task -----------------------------------------------------------------------------------------

_SUM, _PRODUCT, _ATOM = 1, 2, 3  # how tightly an expression binds
_Term = tuple[Fraction, str, int]


def _expressions(terms: list[_Term]) -> Iterator[_Term]:
    """All ways to join the terms, two at a time, into one."""
    if len(terms) == 1:
        yield terms[0]
        return
    for i, j in combinations(range(len(terms)), 2):
        others = [term for k, term in enumerate(terms) if k not in (i, j)]
        for joined in _join(terms[i], terms[j]):
            yield from _expressions([joined, *others])


def _join(a: _Term, b: _Term) -> Iterator[_Term]:
    def within(term: _Term, binding: int) -> str:
        return term[1] if term[2] >= binding else f"({term[1]})"

    high, low = (a, b) if a[0] >= b[0] else (b, a)
    yield a[0] + b[0], f"{a[1]} + {b[1]}", _SUM
    yield high[0] - low[0], f"{high[1]} - {within(low, _PRODUCT)}", _SUM
    yield a[0] * b[0], f"{within(a, _PRODUCT)} * {within(b, _PRODUCT)}", _PRODUCT
    for over, under in ((a, b), (b, a)):
        if under[0] != 0:
            yield over[0] / under[0], f"{within(over, _PRODUCT)} / {within(under, _ATOM)}", _PRODUCT


# --- many tasks at once ----------------------------------------------------------------------------------------------

_Fractions = tuple[np.ndarray, np.ndarray]  # numerators and denominators (N,S) of S values a task, not reduced
STATES = {1: 1, 2: 5, 3: 75, 4: 1_875, 5: 65_625, 6: 3_093_750}  # S: values that K numbers can be joined into


def solvable(nums_NK: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """Which of N tasks of K numbers have a solution: bool (N,). Exact: integers throughout, no rounding."""
    n = nums_NK.shape[1]
    rows = max(1, 15_000 // STATES[n - 1])  # the arrays then fit a processor's cache
    chunks = [slice(start, start + rows) for start in range(0, len(nums_NK), rows)]
    return np.concatenate([_solvable(nums_NK[c], targets_N[c]) for c in chunks] or [np.zeros(0, dtype=bool)])


def _solvable(nums_NK: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """All values of every proper subset (a bit mask) of the numbers; then the last step is tested for the target."""
    everything = 2 ** nums_NK.shape[1] - 1
    values: dict[int, _Fractions] = {}
    for j, column_N in enumerate(nums_NK.T):
        values[1 << j] = column_N[:, None].astype(np.int64), np.ones((len(nums_NK), 1), dtype=np.int64)
    for subset in range(1, everything):
        if subset not in values:
            joined = [pair for half in _halves(subset) for pair in _combine(values[half], values[subset ^ half])]
            nums, dens = zip(*joined, strict=True)
            values[subset] = np.concatenate(nums, axis=1), np.concatenate(dens, axis=1)
    found_N = np.zeros(len(nums_NK), dtype=bool)
    for half in _halves(everything):
        todo = np.flatnonzero(~found_N)  # a task with a solution needs no second one
        if not len(todo):
            break
        a, b = ((num[todo], den[todo]) for num, den in (values[half], values[everything ^ half]))
        for num, den in _combine(a, b):
            found_N[todo] |= (num == targets_N[todo, None] * den).any(axis=1)
    return found_N


def _halves(subset: int) -> Iterator[int]:
    """Each way to split a subset in two, once: yields the part that holds its lowest element."""
    half = (subset - 1) & subset
    while half:
        if half & subset & -subset:
            yield half
        half = (half - 1) & subset


def _combine(a: _Fractions, b: _Fractions) -> Iterator[_Fractions]:
    """Sum, absolute difference, product and both quotients of each value of a with each of b.

    If the divisor is 0, the other number (also their sum) takes the quotient's place.
    """
    (p, q), (r, s) = ((x[:, :, None] for x in a), (x[:, None, :] for x in b))
    ps, rq, qs = p * s, r * q, q * s
    results = (
        (ps + rq, qs),
        (np.abs(ps - rq), qs),
        (p * r, qs),
        (ps, q * np.where(r == 0, s, r)),
        (rq, s * np.where(p == 0, q, p)),
    )
    for num, den in results:
        yield num.reshape(len(num), -1), den.reshape(len(den), -1)


# --- where tasks come from -------------------------------------------------------------------------------------------

_SPLIT, _NUMBER, _TARGET, _ORDER, _COUNT = range(1, 6)  # what a hash is for


class _Limits(NamedTuple):
    """Ranges, ends included."""

    min_number: int
    max_number: int
    min_target: int
    max_target: int

    @property
    def numbers(self) -> int:
        return self.max_number - self.min_number + 1

    @property
    def targets(self) -> int:
        return self.max_target - self.min_target + 1


def _tasks(split: Split, seed: int, n: int, limits: _Limits) -> Iterator[Task]:
    """The distinct solvable tasks of ``n`` numbers in one split, in an order that the seed decides."""
    if comb(limits.numbers + n - 1, n) * limits.targets <= ENUMERATE_UP_TO:
        batches = iter([_all_pairs(seed, n, limits)])
    else:
        batches = (_random_pairs(seed, n, limits, draw) for draw in count())
    seen: set[tuple[int, ...]] = set()
    barren = 0
    for nums_NK, targets_N in batches:
        before, drawn = len(seen), len(targets_N)
        in_split_N = _held_out(nums_NK, targets_N) == (split == "eval")
        nums_NK, targets_N = nums_NK[in_split_N], targets_N[in_split_N]
        good_N = solvable(nums_NK, targets_N)
        for nums, target in zip(nums_NK[good_N].tolist(), targets_N[good_N].tolist(), strict=True):
            key = (*sorted(nums), target)
            if key not in seen:
                seen.add(key)
                yield nums, target
        barren = barren + drawn if len(seen) == before else 0
        if barren > GIVE_UP_AFTER:
            return


def _random_pairs(seed: int, n: int, limits: _Limits, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of one draw, uniform: numbers (N,K) and targets (N,)."""
    rows_N = draw * CANDIDATES[n] + np.arange(CANDIDATES[n])
    nums_NK = _hash(_NUMBER, seed, n, rows_N[:, None], np.arange(n)) % np.uint64(limits.numbers)
    targets_N = _hash(_TARGET, seed, n, rows_N) % np.uint64(limits.targets)
    return limits.min_number + nums_NK.astype(np.int64), limits.min_target + targets_N.astype(np.int64)


def _all_pairs(seed: int, n: int, limits: _Limits) -> tuple[np.ndarray, np.ndarray]:
    """Every multiset with every target. The seed shuffles the tasks, and the numbers within each."""
    multisets_MK = np.array(list(combinations_with_replacement(range(limits.min_number, limits.max_number + 1), n)))
    targets = np.arange(limits.min_target, limits.max_target + 1)
    nums_NK, targets_N = np.repeat(multisets_MK, len(targets), axis=0), np.tile(targets, len(multisets_MK))
    place_NK = _hash(_NUMBER, seed, n, np.arange(len(nums_NK))[:, None], np.arange(n))
    nums_NK = np.take_along_axis(nums_NK, place_NK.argsort(axis=1, kind="stable"), axis=1)
    order_N = _hash(_ORDER, seed, n, np.arange(len(nums_NK))).argsort(kind="stable")
    return nums_NK[order_N], targets_N[order_N]


def _interleave(sources: list[Iterator[Task]], seed: int) -> Iterator[Task]:
    """Tasks from the sources, each time from one picked at random, until all have run out."""
    picks = (bits for row in count(0, 1024) for bits in _hash(_COUNT, seed, np.arange(row, row + 1024)).tolist())
    for pick in picks:
        while sources:
            source = sources[pick % len(sources)]
            task = next(source, None)
            if task is not None:
                yield task
                break
            sources.remove(source)
        else:
            return


def _held_out(nums_NK: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """Whether each task is in the held-out split, by a hash of its sorted numbers and target alone: bool (N,)."""
    columns = np.sort(nums_NK, axis=1).T
    return _hash(_SPLIT, *columns, targets_N) % np.uint64(EVAL_SHARE) == 0


def _hash(*parts: int | np.ndarray) -> np.ndarray:
    """64 uniform bits of any integers, elementwise over arrays (SplitMix64's finalizer, folded over the parts)."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            word = np.asarray(part % 2**64 if isinstance(part, int) else part).astype(np.uint64)
            state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state


def _check_range(what: str, low: int, high: int, lowest: int, highest: int = 10**9) -> None:
    for name, value in ((f"min_{what}", low), (f"max_{what}", high)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} is an integer, not {value!r}")
    if not lowest <= low <= high <= highest:
        raise ValueError(f"need {lowest} <= min_{what} <= max_{what} <= {highest}, got {low} and {high}")

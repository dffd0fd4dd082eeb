"""Tasks of reasoning-gym's generators (package ``reasoning-gym``, 0.1.25): as many as wanted, of any difficulty.

Only generators that our rewards can score are taken. Their own ``score_answer`` is never called, because some evaluate
what a model wrote. The columns besides ``prompt``, and the reward that they are for:

    NUMBERS     ``answer`` is ``#### 42``: reward ``gsm8k``, which takes a number and nothing else. Reward ``math``
                reads it too, but it takes ``4 - 1 - 7`` for -4, so a policy could copy such a question
    TEXTS       ``answer`` is a word, a name, True or False, a reduced fraction: reward ``math``
    COUNTDOWN   ``nums`` and ``target``: reward ``countdown``

For these, it was measured that the reward reads each answer and finds it equal to itself and to no other. ``REFUSED``
has the other generators, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from itertools import count, islice
from typing import Any, Literal

from datasets import Dataset

from data.splits import held_out

Split = Literal["train", "eval"]

DEFAULT_SIZE = {"train": 4_096, "eval": 256}
EVAL_SHARE = 4  # one question in 4 is held out
GIVE_UP_AFTER = 5_000  # draws in a row without a new question
SEEDS_APART = 2**24  # in reasoning-gym, item i of seed s is item 0 of seed s + i

NUMBERS = (
    "aiw", "basic_arithmetic", "binary_alternation", "chain_sum", "circuit_logic", "count_bits", "count_primes",
    "decimal_chain_sum", "gcd", "gsm_symbolic", "largest_island", "lcm", "leg_counting", "letter_counting", "maze",
    "number_sequence", "products", "rectangle_count", "rotten_oranges", "self_reference", "simple_equations",
    "simple_geometry",
)  # fmt: skip
TEXTS = (
    "bf", "calendar_arithmetic", "color_cube_rotation", "course_schedule", "dice",
    "family_relationships", "figlet_font", "game_of_life_halting", "mahjong_puzzle",
    "needle_haystack", "spell_backward", "string_insertion", "string_manipulation", "syllogism",
    "word_sorting", "zebra_puzzles",
)  # fmt: skip
COUNTDOWN = ("countdown", "puzzle24")
REFUSED = {
    "several answers are right, and only its own scorer can tell": (
        "boxnet", "composite", "cryptarithm", "futoshiki", "graph_color", "group_anagrams", "intermediate_integration",
        "jugs", "kakurasu", "knight_swap", "knights_knaves", "letter_jumble", "mini_sudoku", "n_queens",
        "palindrome_generation", "palindrome_partitioning", "path_star", "propositional_logic", "quantum_lock",
        "rubiks_cube", "rush_hour", "sentence_reordering", "shortest_path", "simple_integration", "sokoban", "sudoku",
        "survo", "tower_of_hanoi", "tsumego", "word_ladder",
    ),
    "its answer is rounded, and right within a tolerance": (
        "advanced_geometry", "coin_flip", "complex_arithmetic", "decimal_arithmetic", "number_format",
        "polynomial_equations", "power_function", "time_intervals",
    ),
    "its question holds an expression as good as the answer, which asks for a certain form": (
        "bitwise_arithmetic", "fraction_simplification", "polynomial_multiplication", "prime_factorization",
    ),
    "its answer is a grid, a list or a text with signs that no reward here compares": (
        "ab", "arc_1d", "arc_agi", "base_conversion", "binary_matrix", "codeio", "emoji_mystery", "game_of_life",
        "list_functions", "manipulate_matrix", "modulo_grid", "number_filtering", "number_sorting", "pool_matrix",
        "rearc", "rotate_matrix", "spiral_matrix", "string_splitting", "string_synthesis", "word_sequence_reversal",
    ),
    "its answer is a sentence, and reward math compares no prose": ("caesar_cipher",),
    "it makes all its questions at once, others for another number of them": ("acre",),
    "its questions depend on Python's hash seed, so that every process has others": (
        "isomorphic_strings", "ransom_note",
    ),
}  # fmt: skip


def build(split: Split, size: int | None = None, seed: int = 0, *, generator: str, **config: Any) -> Dataset:
    """Rows of ``prompt`` (the generator's question) and the columns that its reward needs, no question twice.

    ``config`` are the generator's own settings (``min_terms`` of ``chain_sum``). A question's own hash alone decides
    its split. Row ``i`` does not depend on ``size`` (None is ``DEFAULT_SIZE``, or all that are found). Raises
    ValueError if the package is missing, the generator is refused, its settings are wrong, or it has too few questions.
    """
    if split not in DEFAULT_SIZE:
        raise ValueError(f"split is train or eval, not {split!r}")
    _check(generator)
    wanted = DEFAULT_SIZE[split] if size is None else size
    rows = list(islice(_rows(split, seed, generator, config), wanted))
    if not rows or (size is not None and len(rows) < size):
        raise ValueError(f"{generator} has given only {len(rows)} distinct {split} questions, {wanted} were asked for")
    return Dataset.from_list(rows)


def _check(generator: str) -> None:
    if generator in (*NUMBERS, *TEXTS, *COUNTDOWN):
        return
    for reason, names in REFUSED.items():
        if generator in names:
            raise ValueError(f"generator: {generator} can't be scored by comparing: {reason}")
    known = ", ".join(sorted((*NUMBERS, *TEXTS, *COUNTDOWN)))
    raise ValueError(f"generator: no {generator!r}; there are {known}")


def _rows(split: Split, seed: int, generator: str, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        create = importlib.import_module("reasoning_gym").create_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reasoning_gym needs a package that is not installed ({error.name}): pip install "
            f"'grpo-train[reasoning-gym]'"
        ) from error
    try:
        items = create(generator, size=SEEDS_APART, seed=seed * SEEDS_APART, **config)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"{generator} refuses these settings: {error}") from error
    seen: set[str] = set()
    barren = 0
    for index in count():
        with contextlib.redirect_stdout(io.StringIO()):  # bf prints a dot for every question
            item = items[index]
        barren += 1
        if item["question"] not in seen and held_out(item["question"], EVAL_SHARE) == (split == "eval"):
            seen.add(item["question"])
            barren = 0
            yield _row(generator, item)
        if barren > GIVE_UP_AFTER:
            return


def _row(generator: str, item: dict[str, Any]) -> dict[str, Any]:
    row = {"prompt": item["question"]}
    if generator in COUNTDOWN:
        return {**row, "nums": list(item["metadata"]["numbers"]), "target": item["metadata"].get("target", 24)}
    answer = str(item["answer"])
    return {**row, "answer": f"#### {answer}" if generator in NUMBERS else answer}

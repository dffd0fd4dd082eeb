"""The built-in games: what they answer, when they end, what they pay, and what their scripted players get."""

from __future__ import annotations

import pytest

from data import number_guess as guess_rows
from data import wordle as wordle_rows
from grpo.environments import number_guess, wordle
from grpo.environments.number_guess import NumberGuess
from grpo.environments.wordle import Wordle, marks


def played(game, row, turns):
    """What was answered to each turn, up to the end, and whether it ended."""
    game.reset(**row)
    answers = []
    for turn in turns:
        answers.append(game.step(turn))
        if answers[-1][-1]:
            break
    return [answer[0] for answer in answers], answers[-1][-1]


def test_halving_finds_every_number_in_six_turns_and_is_paid_in_full():
    turns = []
    for secret in range(1, 64):
        row = {"secret": secret, "low": 1, "high": 63, "max_turns": 8, "prompt": "…"}
        game = NumberGuess()
        answers, done = played(game, row, number_guess.play(row))
        turns.append(len(answers))
        assert (done, game.found, game.get_reward()) == (True, True, 1.0)
    assert max(turns) == 6
    assert sum(turns) / 63 == pytest.approx(5.095, abs=0.001)


def test_late_turns_pay_less_and_none_pays_nothing():
    row = {"secret": 63}
    paid = []
    for turns in range(5, 9):
        game = NumberGuess()
        played(game, row, [*map(str, range(1, turns)), "63"])
        paid.append(game.get_reward())
    assert paid == pytest.approx([1, 1, 2 / 3, 1 / 3])
    game = NumberGuess()
    answers, done = played(game, row, map(str, range(1, 20)))
    assert (len(answers), done, game.get_reward()) == (8, True, 0.0)


def test_a_guess_is_the_last_number_and_nonsense_costs_a_turn():
    game = NumberGuess()
    error = "error: say a number from 1 to 63"
    turns = ["<think> 5 or 40 </think> I say 20", "seven", "<think> 41", "<think> 41 </think>", "64", "0", "3.5"]
    answers, done = played(game, {"secret": 41}, turns)
    assert answers == ["higher", *[error] * 6]
    turns = ["64", "40 then 41", "1e1"]
    answers, done = played(game, {"secret": 41}, turns)
    assert answers == [error, "found in 2 turns"]
    assert done


def test_a_turn_can_be_paid_by_itself():
    game = NumberGuess(every_turn=True)
    game.reset(secret=48)
    assert game.step("32") == ("higher", pytest.approx(32 / 63), False)
    assert game.step("32") == ("higher", 0.0, False)  # it rules out nothing more
    assert game.step("?")[1] == 0.0
    assert game.step("48") == ("found in 4 turns", 1.0, True)


@pytest.mark.parametrize("row", [{}, {"secret": 0}, {"secret": 9, "high": 8}])
def test_a_row_without_a_sound_secret_is_refused(row):
    with pytest.raises(ValueError, match=r"the row's column secret must be from 1 to \d+"):
        NumberGuess().reset(**row)
    with pytest.raises(ValueError, match="low and high"):
        NumberGuess(low=5, high=5)


def test_games_of_both_splits_are_different_and_their_secrets_are_spread():
    train, held_out = (guess_rows.rows(split, 1000) for split in ("train", "eval"))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert {row["secret"] for row in held_out} == set(range(1, 64))


@pytest.mark.parametrize(
    ("guess", "secret", "expected"),
    [
        ("crane", "crane", "GGGGG"),
        ("slate", "crane", "--G-G"),
        ("eerie", "crane", "--Y-G"),
        ("allow", "label", "YYY--"),
        ("alarm", "label", "YY---"),
        ("sleep", "level", "-YYG-"),
        ("sheet", "elder", "--YG-"),
    ],
)
def test_marks_follow_the_rule_for_repeated_letters(guess, secret, expected):
    assert marks(guess, secret) == expected


def test_wordle_answers_errors_finds_and_ends():
    game = Wordle()
    turns = ["I try stage", "zzzzz", "<think>crane", "<think>crane</think> Crane!"]
    answers, done = played(game, {"secret": "crane"}, turns)
    assert answers[0] == "s t a g e\n- - G - G"
    assert answers[1:3] == ["error: zzzzz is not in the list of words", "error: say a word of five letters"]
    assert (answers[3], done, game.get_reward()) == ("c r a n e\nG G G G G", True, 1.0)
    answers, done = played(game, {"secret": "crane"}, ["stage"] * 9)
    assert (len(answers), done, game.get_reward()) == (6, True, 0.0)
    faster = Wordle(faster=True)
    paid = []
    for turns in (1, 3, 6):
        played(faster, {"secret": "crane"}, [*["stage"] * (turns - 1), "crane"])
        paid.append(faster.get_reward())
    assert paid == pytest.approx([1.0, 0.8, 0.5])


def test_wordle_refuses_what_is_no_word():
    with pytest.raises(ValueError, match="must be one of the words, it is 'zzzzz'"):
        Wordle().reset(secret="zzzzz")
    with pytest.raises(ValueError, match="'four' is not made of five letters"):
        Wordle(words=["four"])


def test_every_word_can_be_played_and_no_held_out_word_is_trained_on():
    assert len(set(wordle_rows.WORDS)) == len(wordle_rows.WORDS) == 510
    train, held_out = (wordle_rows.rows(split, 600) for split in ("train", "eval"))
    assert not {row["secret"] for row in train} & {row["secret"] for row in held_out}
    assert len({row["prompt"] for row in train + held_out}) == 1200
    for row in held_out[:5]:
        game = Wordle()
        played(game, row, wordle.play(row))
        assert game.get_reward() == 1.0

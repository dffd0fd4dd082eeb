"""``grpo audit`` of environments: sound ones pass, and what pays idle players or leaks is found."""

from __future__ import annotations

import pytest

from data import number_guess
from grpo.audit.environment import audit_environment
from grpo.config import Recipe
from grpo.errors import UserError

ENVIRONMENTS = '''
class Leaky:
    """A game that pays for being there, and says its answer in an error."""
    def reset(self, answer, **row):
        self.answer, self.turns = answer, 0
    def step(self, text):
        self.turns += 1
        return f"wrong, it is not {text.strip() or 'nothing'}; the answer was {self.answer}", self.turns == 3
    def get_reward(self):
        return 0.5

class Sound:
    """A tool."""
    def reset(self, answer, **row):
        self.answer, self.right = answer, False
    def guess(self, word: str) -> str:
        """Guess.

        Args:
            word: The word.
        """
        if word == "crash":
            raise SystemExit
        if word == "raise":
            raise KeyError(word)
        self.right = word == self.answer
        return "yes" if self.right else "no"
    def get_reward(self):
        return float(self.right)

class Unpaid(Sound):
    def get_reward(self):
        float(self.right)

class UnpaidGame:
    def reset(self, **row):
        pass
    def step(self, text):
        return "no", False

def play(row):
    return row["turns"]
'''


def recipe(environment):
    return Recipe.model_validate(
        {
            "model": {"name": "m"},
            "data": {"name": "number_guess"},
            "environment": environment,
            "training": {"output_dir": "runs/x"},
        }
    )


def audited(environment, rows):
    told: list[str] = []
    findings = audit_environment(recipe(environment), [(f"row:{i}", row) for i, row in enumerate(rows)], told.append)
    return findings, "\n".join(told)


@pytest.mark.slow
def test_a_sound_game_passes_its_audit_although_a_guess_may_be_lucky():
    rows = number_guess.rows("eval", 12)
    findings, told = audited({"name": "number_guess", "max_turns": 8}, rows)
    assert findings == []
    assert "the script     is paid 1 to 1, 1 on average" in told
    assert "idle play      is paid 0 to 0" in told


@pytest.mark.slow
def test_pay_for_nothing_and_answers_that_leak_are_found(tmp_path):
    file = tmp_path / "env_of_audit.py"
    file.write_text(ENVIRONMENTS)
    words = ["apple", "bread", "candy", "dream", "eagle"]
    rows = [{"answer": word, "turns": ["ok"]} for word in words]
    findings, _ = audited({"path": f"{file}:Leaky", "max_turns": 4}, rows)
    where = f"environment {file}:Leaky: "
    assert findings[:3] == [
        f"{where}{play} is paid 0.5 on average, and the script 0.5" for play in ("idle play", "babbling", "looping")
    ]
    assert findings[3:] == [
        f"{where}what it says to idle play holds the row's own answer in 5 of 5 rows (first row:0), another row's in 0"
    ]


@pytest.mark.slow
def test_a_script_that_is_not_paid_or_fails_is_found(tmp_path):
    file = tmp_path / "env_of_audit_2.py"
    file.write_text(ENVIRONMENTS)

    def row(answer, word):
        return {"answer": answer, "turns": [{"name": "guess", "arguments": {"word": word}}]}

    environment = {"path": f"{file}:Sound"}
    assert audited(environment, [row("apple", "apple"), row("bread", "bread")])[0] == []
    findings, told = audited(environment, [row("apple", "apple"), row("bread", "wrong"), row("candy", "crash")])
    where = f"environment {file}:Sound: "
    assert findings[0].startswith(f"{where}the script fails in 1 of 3 rows, first by crashed: ")
    assert findings[1:] == [f"{where}the script is paid nothing in 1 of 3 rows, first row:1"]
    assert "fails in 1 rows (crashed)" in told
    raising = row("apple", "apple") | {"turns": [*row("", "raise")["turns"], *row("", "apple")["turns"]]}
    findings = audited(environment, [row("bread", "bread"), raising])[0]
    assert findings == [
        f"{where}calls of the script raise in 1 of 2 rows, first guess: " + '{"error": "KeyError: \'raise\'"}'
    ]
    for name in ("Unpaid", "UnpaidGame"):
        findings = audited({"path": f"{file}:{name}"}, [{"answer": "apple", "turns": []}])[0]
        assert len(findings) == 1
        assert findings[0].startswith(
            f"environment {file}:{name}: it pays nothing, not even 0, in any row: does get_re"
        )
    with pytest.raises(UserError, match=r"play\(row\) returned a list: \['text'\] for row:0; expected calls"):
        audited(environment, [{"answer": "apple", "turns": ["text"]}])

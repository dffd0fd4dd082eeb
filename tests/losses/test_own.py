"""A loss of the user's own: what is wrong with it is told in one line, at the latest when it is first called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo.errors import RunError, UserError
from grpo.losses import Counts, find_loss
from tests.losses.calling import policy_loss

HEAD = """
import torch
from grpo.losses import loss
from grpo.losses.tokens import by_tokens, token_sum

own = loss(reduce=token_sum, denominator=by_tokens)
"""


def loss_of(folder: Path, body: str, name: str = "mine", calls: int = 1) -> torch.Tensor:
    """The loss of the function ``name`` of a file, called some times with a batch of 2 by 3."""
    file = folder / "my_loss.py"
    file.write_text(HEAD + body)
    logps_BT = torch.full((2, 3), -1.0, requires_grad=True)
    for _ in range(calls):
        loss, _ = policy_loss(
            logps_BT,
            None,
            None,
            torch.tensor([1.0, -1.0]),
            torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
            Counts(tokens=5, sequences=2, micro_batches=1, max_completion_length=3),
            loss_type=f"{file}:{name}",
        )
    return loss


EXPECTED = r"expected a floating-point tensor of shape \(B,T\), here \(2, 3\)"
WRONG = {
    "tokens.ratio_BT.tanh().sum()": rf"it returned a tensor of shape \(\); {EXPECTED}; reduce sums it up",
    "tokens.ratio_BT.sum(1)": rf"it returned a tensor of shape \(2,\); {EXPECTED}",
    "tokens.advantages_B1": rf"it returned a tensor of shape \(2, 1\); {EXPECTED}",
    "(tokens.ratio_BT > 0)": rf"it returned a tensor of torch.bool; {EXPECTED}",
    "0.5": rf"it returned a float: 0.5; {EXPECTED}",
    "None": rf"it returned None; {EXPECTED}",
    "-tokens.ratio_BT.detach()": "it returned a tensor without gradient; compute it from logps_BT, log_ratio_BT or .*",
    "(tokens.ratio_BT - 1).log()": "it returned nan or inf at 6 of 6 positions; .*",
    "tokens.ratios_BT": r".*/my_loss.py:9: AttributeError: 'Tokens' object has no attribute 'ratios_BT'",
    "tokens.ratio_BT @ tokens.ratio_BT": r".*/my_loss.py:9: RuntimeError: mat1 and mat2 shapes .*",
}


@pytest.mark.parametrize("result", WRONG)
def test_a_wrong_result_is_refused_at_the_first_call(tmp_path, result):
    with pytest.raises(UserError, match=rf"^algorithm.loss_type: {tmp_path}/my_loss.py:mine: {WRONG[result]}$"):
        loss_of(tmp_path, f"@own\ndef mine(tokens, options):\n    return {result}\n")


PARTS = {
    "reduce=lambda loss_BT, mask_BT: loss_BT, denominator=by_tokens": (
        r"mine: reduce: it returned a tensor of shape \(2, 3\); expected a tensor of one number, .*"
    ),
    "reduce=token_sum, denominator=lambda counts: None": r"mine: denominator: it returned None; expected a number, .*",
    "reduce=token_sum, denominator=by_tokens, measure=lambda tokens, options: {'x': 1}": (
        r"mine: measure: it returned a dict: \{'x': 1\}; expected a dict of tensors of one number each"
    ),
    "reduce=token_sum, denominator=5": r"mine: denominator is an int: 5; expected a function of \(counts\)",
    "reduce=sum, denominator=by_tokens, level='word'": "mine: level must be token, sequence or .*, got 'word'",
    "reduce=lambda loss_BT: 0, denominator=by_tokens": (
        r"mine: reduce takes \(loss_BT\); it is called with \(loss_BT, mask_BT\)"
    ),
}


@pytest.mark.parametrize("parts", PARTS)
def test_a_wrong_part_is_refused(tmp_path, parts):
    with pytest.raises(UserError, match=rf"^algorithm.loss_type: {tmp_path}/my_loss.py:{PARTS[parts]}$"):
        loss_of(tmp_path, f"@loss({parts})\ndef mine(tokens, options):\n    return -tokens.ratio_BT\n")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def mine(tokens, options): ...", "mine is not decorated by @loss(.*) of grpo.losses"),
        ("mine = None", "mine is None; expected a function under @loss(.*) of grpo.losses"),
        ("@own\ndef mine(tokens): ...", r"mine takes \(tokens\); it is called with \(tokens, options\)"),
    ],
)
def test_what_is_no_loss_is_refused_before_anything_is_waited_for(tmp_path, body, said):
    (tmp_path / "my_loss.py").write_text(HEAD + body)
    with pytest.raises(UserError, match=rf"^algorithm.loss_type: {tmp_path}/my_loss.py:{said}$"):
        find_loss(f"{tmp_path}/my_loss.py:mine")


def test_a_decorator_without_its_parts_is_named_by_its_line(tmp_path):
    with pytest.raises(
        UserError, match=r"my_loss.py:7: TypeError: loss\(\) takes 0 positional arguments but 1 was given$"
    ):
        loss_of(tmp_path, "@loss\ndef mine(tokens, options):\n    return -tokens.ratio_BT\n")


def test_what_goes_wrong_later_is_the_run_s(tmp_path):
    body = """
calls = []
@own
def mine(tokens, options):
    calls.append(1)
    return -tokens.ratio_BT / (3 - len(calls) if len(calls) < 3 else None)
"""
    with pytest.raises(RunError, match=r"my_loss.py:12: TypeError: unsupported operand"):
        loss_of(tmp_path, body, calls=3)


def test_a_right_one_has_its_value_and_its_gradient(tmp_path):
    assert (
        float(loss_of(tmp_path, "@own\ndef mine(tokens, options):\n    return -2 * tokens.ratio_BT\n").detach()) == -2.0
    )

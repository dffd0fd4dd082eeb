"""docs/models.md in a reduced form: architectures that differ in what can go wrong, each trained whole and with LoRA.

``python -m benchmarks.families`` measures all of them and writes the page.
"""

from __future__ import annotations

import os
import shutil

import pytest

from benchmarks.families.__main__ import main
from benchmarks.families.architectures import CASES, Case
from benchmarks.families.measure import NEAR, Found, measure
from benchmarks.families.page import page

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="the page has a compiler")

PACKED, PADDED = "packed rows", "padded rows"
RIGHT = {  # by kind and note: how rows are computed in the update
    ("qwen2", "yarn rope"): PACKED,  # beyond the length that its rope was made for
    ("gpt2", "dropout 0.3"): PACKED,  # rates of its configuration, Conv1D in place of linear layers
    ("phi3", "longrope"): PACKED,  # rows within its border
    ("gemma2", ""): PADDED,  # windows, soft caps on scores and logits
    ("llama4_text", ""): PADDED,  # chunks that masks alone tell, experts, a body by another name
    ("gpt_oss", ""): PADDED,  # attention sinks
    ("gemma4_text", ""): PADDED,  # layers that differ in the size of their heads
    ("qwen3_5_text", ""): PADDED,  # recurrent layers
}
REFUSED = {
    ("phi3", "longrope, rows beyond it"): "Beyond 32, Phi3ForCausalLM has other rotary frequencies",
    ("bert", ""): "gives a token other logits",
    ("bloom", ""): "does not attend through transformers' attention interface",
}


def case_of(kind: str, note: str) -> Case:
    return next(case for case in CASES if (case.kind, case.note) == (kind, note))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", RIGHT, ids=" ".join)
def test_sampler_update_and_final_are_the_model_itself(name: tuple[str, str], lora: bool) -> None:
    found = measure(case_of(*name), lora=lora)
    assert (found.status, found.why) == ("right", "")
    assert found.sampler is not None
    assert found.trained is not None
    assert max(found.sampler, found.trained) < NEAR
    assert found.beyond[1] > 32, "beyond windows of 8 and ropes of 32"
    assert found.update.startswith(RIGHT[name])


@pytest.mark.parametrize("name", REFUSED, ids=" ".join)
def test_what_cannot_be_trained_is_refused_when_the_policy_is_made(name: tuple[str, str]) -> None:
    found = measure(case_of(*name), lora=False)
    assert found.status == "refused"
    assert REFUSED[name] in found.why


def test_the_page_says_what_was_found() -> None:
    right = Found(model="LlamaForCausalLM", update="packed rows, each", decoding="one compiled call a step")
    padded = Found(
        model="X", update="padded rows, which are slower, for X: it has sinks", decoding="through transformers"
    )
    wrong, refused = Found("wrong", "by 2 nats", "X"), Found("refused", "no masks", "Y")
    text = page([(CASES[0], [right, right]), (CASES[1], [padded, wrong]), (CASES[2], [refused, refused])])
    assert "1 of 3 cases are right" in text
    assert f"| {CASES[0].kind} | LlamaForCausalLM | packed | compiled | right | right |" in text
    assert f"| {CASES[1].kind} | X | padded: it has sinks | modules | right | wrong |" in text
    assert f"## Refused\n\n- **{CASES[2].kind}** Y: no masks\n" in text
    assert f"## Not right\n\n- **{CASES[1].kind}** X (LoRA): by 2 nats\n" in text


def test_every_case_has_a_name_of_its_own_and_a_stranger_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [(case.kind, case.note) for case in CASES]
    assert len(names) == len(set(names))
    assert len({case.kind for case in CASES}) > 100
    monkeypatch.setattr("sys.argv", ["families", "lama"])
    with pytest.raises(SystemExit):
        main()
    assert "no case of lama" in capsys.readouterr().err

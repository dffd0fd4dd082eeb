"""Several processes, replicated (DDP), sharded (FSDP2) and both (HSDP), compute what one does: in float32 to rounding,
in bfloat16 within what rounding to bfloat16 changes anyway. They go on where one of them runs out of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from tests.launching import ROOT, environment
from tests.processes import same_numbers
from tests.processes.same_numbers import KINDS, PLACES, Gradient
from tests.update.test_step import distance

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Found = dict[str, Any]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What several processes found, kind by kind."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, str(ROOT / "tests/processes/same_numbers.py"), str(tiny_model), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def found(folder: Path, kind: str) -> Found:
    return torch.load(folder / f"{kind}.pt")


def alone(model: Path, micro_batch_size: int = 8, **changes: Any) -> Gradient:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = same_numbers.recipe_of(str(model), micro_batch_size, **changes)
    return same_numbers.step_of(recipe, same_numbers.policy_of(recipe))[0]


@pytest.fixture(scope="module")
def one_process(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The same of one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return same_numbers.everything(str(tiny_model), tmp_path_factory.mktemp("alone"), "ddp")


def test_the_gradient_is_that_of_one_process(one_process: Found, found: Found) -> None:
    for name, gradient in found["losses"].items():
        if name != "bnpo":  # its denominator is a micro-batch's
            assert distance(one_process["losses"][name], gradient) < 1e-5, name


def test_a_teacher_is_whole_on_every_process_and_teaches_all_the_same(
    one_process: Found, found: Found, kind: str
) -> None:
    if kind == "hsdp":
        return
    assert distance(one_process["teacher"]["gradient"], found["teacher"]["gradient"]) < 1e-5
    expected = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny_base", dtype=torch.float32).state_dict()
    assert len(found["teacher"]["held"]) == KINDS[kind]
    for held in found["teacher"]["held"]:
        assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_in_bfloat16_it_is_too_within_what_rounding_changes(
    tiny_model: Path, one_process: Found, folder: Path, trained: str
) -> None:
    """Rounding is measured: how far the gradient of one process in bfloat16 is from that in float32. With whole weights
    rounding falls in the same places, and splitting differently may change as much as micro-batches of another size."""
    changes = {"lora": same_numbers.LORA} if trained == "lora" else {}
    exact, rounded = alone(tiny_model, **changes), one_process[trained]["at_once"]
    rounding = distance(exact, rounded)
    reordering = max(distance(rounded, alone(tiny_model, size, dtype="bfloat16", **changes)) for size in (1, 2, 4))
    for kind in KINDS:
        found = torch.load(folder / f"{kind}.pt").get(trained)
        if found is None:
            continue
        for gradient in (found["gradient"], found["at_once"]):
            figures = distance(exact, gradient), distance(rounded, gradient)
            print(f"{trained} {kind}: {figures}, rounding {rounding}, reordering {reordering}")
            assert figures[0] < 1.5 * rounding
            assert figures[1] < (1.5 * reordering if kind == "ddp" or trained == "lora" else 1.5 * rounding)


def test_log_probabilities_are_float32(found: Found) -> None:
    for trained in {"full", "lora"} & found.keys():
        assert found[trained]["dtypes"] == {torch.float32}


def test_gradients_are_reduced_in_float32(found: Found) -> None:
    """A sum of two numbers of bfloat16 has more digits than they. In bfloat16 it would be rounded to their number."""
    for trained in {"full", "lora"} & found.keys():
        numbers = torch.cat([g.flatten() for g in found[trained]["at_once"].values()])
        assert float((numbers != numbers.bfloat16()).float().mean()) > 0.25


def test_between_micro_batches_a_process_holds_its_share_of_the_gradient(found: Found, kind: str) -> None:
    for trained in {"full", "lora"} & found.keys():
        whole = sum(g.nbytes for g in found[trained]["gradient"].values())
        assert found[trained]["held"] == [whole if kind == "ddp" else whole // 2] * KINDS[kind]


def test_a_policy_hands_out_the_states_that_one_process_does(one_process: Found, found: Found) -> None:
    """Whole, LoRA's adapters merged or apart; the merged one to the hf backend too, where that has a copy."""
    assert found["full"].keys() >= {"state", "synced"}
    for trained in {"full", "lora"} & found.keys():
        for name, tensor in found[trained].get("synced", {}).items():
            assert torch.equal(tensor, found[trained]["state"][name].bfloat16()), name
        for name in {"state", "base", "adapter"} & found[trained].keys():
            one, several = one_process[trained][name], found[trained][name]
            assert one.keys() == several.keys()
            assert all(torch.equal(several[key], tensor) for key, tensor in one.items()), f"{trained} {name}"
    assert not torch.equal(one_process["lora"]["state"][Q], one_process["lora"]["base"][Q]), "adapters say something"


def test_shards_are_read_back_as_they_were_written(found: Found, kind: str) -> None:
    for trained in {"full", "lora"} & found.keys() if kind != "ddp" else ():
        assert found[trained]["shards"] == [True] * KINDS[kind]


def test_what_it_saves_loads(folder: Path, kind: str, found: Found) -> None:
    for trained in {"full", "lora"} & found.keys():
        state = AutoModelForCausalLM.from_pretrained(folder / kind / trained, dtype=torch.float32).state_dict()
        assert all(torch.equal(state[name], t.bfloat16().float()) for name, t in found[trained]["state"].items())


def test_references_and_scores_are_those_of_one_process(one_process: Found, found: Found) -> None:
    """With LoRA the reference is the policy without its adapters."""
    for trained in {"full", "lora"} & found.keys():
        for ours, expected in zip(found[trained]["scored"], one_process[trained]["scored"], strict=True):
            for x, y in zip(ours, expected, strict=True):
                assert x == pytest.approx(y, abs=0.05)


def test_where_one_runs_out_of_memory_all_begin_again_in_halves(found: Found, kind: str) -> None:
    """Once, in its second pass, wherever it is then: with the same gradient and scores, and the same size on all."""
    for trained in {"out of memory", "out of memory with LoRA"} & found.keys():
        expected = found[trained]["nowhere"]
        assert set(expected["sizes"]) == {None}
        for place in set(found[trained]) & set(PLACES):
            got = found[trained][place]
            assert len(got["sizes"]) == KINDS[kind]
            assert len(set(got["sizes"])) == 1, place
            assert 20 < got["sizes"][0] < 60, place
            assert distance(expected["gradient"], got["gradient"]) < 1e-5, place
            for x, y in zip(expected["scored"], got["scored"], strict=True):
                assert x == pytest.approx(y, abs=1e-4), place


def test_where_not_even_one_sequence_fits_all_say_on_which_process(found: Found, kind: str) -> None:
    said = found["out of memory"]["never fits"]
    assert len(said) == KINDS[kind]
    assert len(set(said)) == 1
    assert f"rank {KINDS[kind] - 1}: out of memory in a micro-batch of" in said[0]
    assert "a single sequence does not fit" in said[0]


def test_a_process_without_a_gradient_counts_as_zeros(folder: Path) -> None:
    assert torch.load(folder / "ddp.pt")["averages"] == [[1.0, 1.5]] * 2

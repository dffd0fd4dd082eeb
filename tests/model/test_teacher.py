"""A teacher in the process: divergences over the vocabulary beside plain autograd; real models, one reading the other's
tokens; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from data.tiny import build_tokenizer, write_tiny_model
from grpo.config import TeacherConfig
from grpo.errors import UserError
from grpo.losses import divergence_of
from grpo.model import devices, logprobs
from grpo.model.same_tokenizer import differences
from grpo.model.teacher import _FromHead, _FromTop, check_teacher, compared_with, load_teacher
from grpo.types import TeacherSays
from tests.conftest import make_policy, make_recipe
from tests.gradient_of_step import sequences

TEMPERATURE = 0.7


class Head:
    """Stands for a teacher's head."""

    def __init__(self, weight_VH: torch.Tensor):
        self.weight_VH, self.vocab_size = weight_VH, len(weight_VH)

    def logits(self, hidden_rH: torch.Tensor) -> torch.Tensor:
        return hidden_rH @ self.weight_VH.T


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("chunk", "tile", "kept"), [(1, 1, 0), (7, 3, 14), (1000, 9, 50)])
@pytest.mark.parametrize("of", [50, 44, 60, "top"])
def test_divergence_and_gradient_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int, tile: int, kept: int, of: Any
) -> None:
    """Beside the log-probability's and the entropy's own gradients; in chunks, tiles and kept rows; of a teacher with
    as many tokens, with fewer, with more, and of its likeliest alone."""
    monkeypatch.setitem(devices.LOGITS, "cpu", devices.LogitSizes(chunk * 50, tile * 50, kept * 50))
    torch.manual_seed(0)
    head, V = torch.nn.Linear(16, 50), 50 if of == "top" else of
    teacher, hidden_of_teacher_NH = Head(torch.randn(V, 12)), torch.randn(23, 12)
    hidden_NH, targets_N = torch.randn(23, 16, requires_grad=True), torch.randint(50, (23,))
    first_N, second_N, third_N = torch.randn(3, 23)
    config = TeacherConfig(name="x", divergence=kind, jsd_beta=0.3 if kind == "jsd" else 0.5)
    log_p_NV = (teacher.logits(hidden_of_teacher_NH) / TEMPERATURE).log_softmax(-1)
    top = log_p_NV.topk(5)
    compared = (
        _FromTop(config, top.indices, top.values)
        if of == "top"
        else _FromHead(config, teacher, hidden_of_teacher_NH, TEMPERATURE)
    )
    logps_N, entropy_N, _, divergence_N = logprobs.token_statistics(
        hidden_NH,
        targets_N,
        head,
        vocab_size=50,
        temperature=TEMPERATURE,
        parameters=head.parameters(),
        entropy_gradient=True,
        teacher=compared,
    )
    (logps_N @ first_N + entropy_N @ second_N + divergence_N @ third_N).backward()
    ours = hidden_NH.grad.clone(), head.weight.grad.clone()
    hidden_NH.grad = head.weight.grad = None

    log_q_NV = (head(hidden_NH) / TEMPERATURE).log_softmax(-1)
    shared = min(50, V)
    pair = log_q_NV[:, :shared].log_softmax(-1), log_p_NV[:, :shared].log_softmax(-1)
    if of == "top":
        q_NK, p_NK = log_q_NV.gather(1, top.indices).exp(), top.values.exp()
        pair = tuple(torch.cat([x, 1 - x.sum(1, keepdim=True)], 1).log() for x in (q_NK, p_NK))
    plain_N = divergence_of(*pair, kind=kind, beta=config.jsd_beta)
    entropy_N = -(log_q_NV.exp() * log_q_NV).sum(-1)
    (log_q_NV.gather(1, targets_N[:, None])[:, 0] @ first_N + entropy_N @ second_N + plain_N @ third_N).backward()
    torch.testing.assert_close(divergence_N, plain_N, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[0], hidden_NH.grad, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(ours[1], head.weight.grad, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another architecture, size and width of embedding, with the tiny model's tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), build_tokenizer()
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=len(tokenizer) + 9, n_positions=512, n_embd=48, n_layer=2, n_head=3, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def taught(student: Path, **teacher: Any) -> tuple[Any, Any]:
    """A policy with its teacher, and the recipe's teacher section."""
    recipe = make_recipe(student, teacher=teacher, rewards=[])
    policy = make_policy(student, rewards=[], teacher=teacher)
    load_teacher(recipe, policy)
    return policy, recipe.teacher


def test_a_teacher_of_another_architecture_reads_the_students_rows(tiny_model: Path, other: Path) -> None:
    """Packed and padded, beside both models' own logits, sequence by sequence."""
    policy, config = taught(tiny_model, name=str(other), dtype="float32")
    teacher, V = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32), policy.model.vocab_size
    expected = []
    for s in sequences():
        ids, at = torch.tensor([s.prompt_ids + s.completion_ids]), slice(len(s.prompt_ids) - 1, -1)
        log_q, log_p = (
            (lm(input_ids=ids).logits[0, at, :V] / TEMPERATURE).log_softmax(-1) for lm in (policy.causal_lm, teacher)
        )
        expected.append(divergence_of(log_q, log_p, kind="reverse_kl"))
    for packed in {policy.packed, False}:
        policy.packed = packed
        batch = policy.collate(sequences())
        _, _, found_BT = policy.compared(batch, TEMPERATURE, compared_with(policy, batch, TEMPERATURE, config))
        for found_T, expected_T in zip(found_BT, expected, strict=True):
            torch.testing.assert_close(found_T[: len(expected_T)], expected_T, atol=1e-4, rtol=1e-4)
    assert policy.teacher is not None
    assert not any(p.requires_grad for p in policy.teacher.model.parameters())
    assert not any("teacher" in name for name in policy.full_state())


def test_a_teacher_that_is_the_student_teaches_nothing_but_its_own_precision(tiny_model: Path) -> None:
    policy, config = taught(tiny_model, name=str(tiny_model), dtype="float32")
    batch = policy.collate(sequences())
    found: dict[str, torch.Tensor] = {}
    for dtype in ("float32", "bfloat16"):
        load_teacher(make_recipe(tiny_model, teacher={"name": str(tiny_model), "dtype": dtype}, rewards=[]), policy)
        assert {str(p.dtype) for p in policy.teacher.model.parameters()} == {f"torch.{dtype}"}
        found[dtype] = policy.compared(batch, 1.0, compared_with(policy, batch, 1.0, config))[2].detach()
    assert float(found["float32"].abs().max()) < 1e-6
    assert 0 < float(found["bfloat16"].mean()) < 1e-3, "rounding"


def test_what_rows_say_of_a_teacher_is_collated_token_by_token(tiny_model: Path) -> None:
    """Completions of other lengths and of other numbers of likeliest tokens, in one micro-batch."""
    policy = make_policy(tiny_model)
    batch = sequences()[:3]
    for s, k in zip(batch, (2, 1, 3), strict=True):
        ids = [list(range(5 + t % 3, 5 + t % 3 + k)) for t in range(len(s.completion_ids))]
        s.teacher = TeacherSays((), ids, [[-1.0 - i for i in range(k)] for _ in ids])
    tensors = policy.collate(batch)
    assert tensors.teacher_ids_BTK.shape == (*tensors.mask_BT.shape, 3)
    assert tensors.teacher_ids_BTK[1, 0].tolist() == [5, -1, -1]
    assert tensors.teacher_top_BTK[2, 1].tolist() == [-1.0, -2.0, -3.0]
    config = TeacherConfig(column="t", divergence="forward_kl")
    _, _, found_BT = policy.compared(tensors, 1.0, compared_with(policy, tensors, 1.0, config))
    found_BT.sum().backward()
    assert ((found_BT > 0) == tensors.completion_mask_BT).all()


# --- what is refused ---


def test_the_same_tokenizer_has_no_differences() -> None:
    assert differences(build_tokenizer(), build_tokenizer()) == []


def test_tokenizers_that_differ_are_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "words", extra=("plums", "pears"))
    recipe = make_recipe(tiny_model, teacher={"name": str(tmp_path / "words")}, rewards=[])
    with pytest.raises(UserError) as said:
        check_teacher(recipe, build_tokenizer())
    assert "words is not the student's" in str(said.value)
    assert "2 tokens are the teacher's alone, the first 'plums' (" in str(said.value)
    assert "Take a teacher of the same family" in str(said.value)
    moved, state = copy.deepcopy(build_tokenizer()), build_tokenizer().backend_tokenizer.to_str()
    for old, new in (("so", "@@"), ("then", "so"), ("@@", "then")):
        state = state.replace(f'"{old}":', f'"{new}":')
    moved._tokenizer = type(moved._tokenizer).from_str(state)
    (found,) = differences(build_tokenizer(), moved)
    assert found.startswith("2 tokens have other ids, the first 'so': ")
    cuts = copy.deepcopy(build_tokenizer())
    cuts.backend_tokenizer.pre_tokenizer = None
    assert "is cut into other tokens" in differences(build_tokenizer(), cuts)[0]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"name": "no/such/folder"}, r"teacher\.name: no/such/folder"),
        ({"name": "OTHER", "tokenizer": "runs/nowhere"}, r"teacher\.name: runs/nowhere does not exist"),
    ],
)
def test_messages_of_loaders_are_about_the_teacher(
    tiny_model: Path, other: Path, teacher: dict[str, Any], message: str
) -> None:
    teacher = {key: str(other) if value == "OTHER" else value for key, value in teacher.items()}
    with pytest.raises(UserError, match=message):
        check_teacher(make_recipe(tiny_model, teacher=teacher, rewards=[]), build_tokenizer())


def test_a_teacher_must_have_as_many_positions_as_the_rows_may_be_long(tiny_model: Path, other: Path) -> None:
    recipe = make_recipe(
        tiny_model, teacher={"name": str(other)}, rewards=[], rollout={"max_completion_length": 500},
        data={"max_prompt_length": 100},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"has 512 positions, and prompt and completion may have 600 tokens together"):
        check_teacher(recipe, build_tokenizer())

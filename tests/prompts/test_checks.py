"""The checks before weights load: each finds its mistake, and a sound recipe passes."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig, LlamaConfig

from grpo.errors import UserError
from grpo.prompts import templates
from grpo.prompts.checks import check_before_loading, stop_token_ids
from tests.prompts.small_rows import CHAT, load, make_tokenizer, questions, recipe, write_rows

MODEL = {"vocab_size": 64, "max_position_embeddings": 4096, "eos_token_id": 3, "bos_token_id": None}


def checked(tokenizer, data: dict, task: bool = False, model: dict | None = None, generation=None, **keywords):
    made = recipe(data, **keywords)
    config = LlamaConfig(**(MODEL | (model or {})))
    loaded = load(data, tokenizer, **keywords) if task else None
    return check_before_loading(made, tokenizer, config, generation, loaded)


def test_a_sound_recipe_has_no_findings(rows_file):
    assert checked(make_tokenizer(), {"path": rows_file, "eval_size": 3}, task=True) == []
    assert checked(make_tokenizer(bos=True), {"path": rows_file, "template": "tinyzero"}, task=True) == []


def test_no_end_of_sequence_token(rows_file):
    without = make_tokenizer(eos=None)
    with pytest.raises(UserError, match=r"no end-of-sequence token in tokenizer.*\(model.tokenizer\).* rollout.stop"):
        checked(without, {"path": rows_file}, model={"eos_token_id": None})
    (warning,) = checked(without, {"path": rows_file}, model={"eos_token_id": None}, rollout={"stop": ["</answer>"]})
    assert "only on rollout.stop" in warning
    with pytest.raises(UserError, match="no end-of-sequence token to end the examples with"):
        checked(without, {"path": rows_file}, stage="sft")


def test_an_end_of_sequence_token_outside_the_vocabulary(rows_file):
    with pytest.raises(UserError, match=r"end-of-sequence token 3 \(<eos>\) is outside the model's vocabulary of 3"):
        checked(make_tokenizer(), {"path": rows_file}, model={"vocab_size": 3})
    with pytest.raises(UserError, match=r"token 900 .unknown to the tokenizer. is outside"):
        checked(make_tokenizer(), {"path": rows_file}, model={"eos_token_id": [3, 900]})


def test_a_tokenizer_larger_than_the_model(rows_file):
    (warning,) = checked(make_tokenizer(), {"path": rows_file}, model={"vocab_size": 20})
    assert "the tokenizer has 51 tokens, the model 20" in warning


def test_stop_tokens_that_disagree(rows_file):
    """As with Qwen2.5 base and a chat tokenizer: config says <|endoftext|>, the tokenizer <|im_end|>."""
    tokenizer, data = make_tokenizer(eos="<|end|>"), {"path": rows_file}
    (warning,) = checked(tokenizer, data)
    assert "ends a text with 5 (<|end|>), the model's configuration with 3 (<eos>)" in warning
    assert "model.tokenizer" in warning
    assert checked(tokenizer, data, generation=GenerationConfig(eos_token_id=[3, 5])) == []
    assert checked(tokenizer, data, model={"eos_token_id": 5}, generation=GenerationConfig(eos_token_id=5)) == []
    assert len(checked(tokenizer, data, model={"eos_token_id": 5}, generation=GenerationConfig(eos_token_id=3))) == 1


def test_stop_token_ids_are_all_of_them():
    tokenizer = make_tokenizer(eos="<|end|>")
    config = LlamaConfig(**(MODEL | {"eos_token_id": [3, 7]}))
    assert stop_token_ids(tokenizer, config, GenerationConfig(eos_token_id=[7, 9])) == [3, 5, 7, 9]
    assert stop_token_ids(tokenizer, config, None) == [3, 5, 7]
    assert stop_token_ids(make_tokenizer(eos=None), LlamaConfig(**(MODEL | {"eos_token_id": None})), None) == []


def test_a_prompt_longer_than_the_limit_is_named(tmp_path):
    rows = [{"prompt": "a" * n, "answer": "x"} for n in (8, 11, 30, 9, 10)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=rf"data.max_prompt_length: 2 of 5 .* longer than 10 .* has 30 \({path}:3\)"):
        checked(make_tokenizer(), {"path": path, "max_prompt_length": 10}, task=True)
    with pytest.raises(UserError, match=r"3 of 5 .* has 31 "):  # BOS counts
        checked(make_tokenizer(bos=True), {"path": path, "max_prompt_length": 10}, task=True)
    assert checked(make_tokenizer(), {"path": path, "max_prompt_length": 30}, task=True) == []


def test_a_completion_to_imitate_longer_than_the_limit_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n}", "completion": "b" * n} for n in (9, 10, 7, 8)])
    rollout = {"max_completion_length": 10}
    with pytest.raises(UserError, match=rf"rollout.max_completion_length: 1 of 4 .* has 11 \({path}:2\)"):
        checked(make_tokenizer(), {"path": path}, task=True, stage="sft", rollout=rollout)


def test_more_tokens_than_positions(rows_file):
    short = {"max_position_embeddings": 1000}
    with pytest.raises(
        UserError, match=r"max_prompt_length \(512\) \+ rollout.max_completion_length \(512\).* the 1000"
    ):
        checked(make_tokenizer(), {"path": rows_file}, model=short)
    lengths = {"rollout": {"max_completion_length": 100}, "evaluation": {"max_completion_length": 600}}
    with pytest.raises(UserError, match=r"\+ evaluation.max_completion_length \(600\)"):
        checked(make_tokenizer(), {"path": rows_file}, model=short, **lengths)


def test_rows_that_pass_the_border_of_a_longrope(rows_file):
    """transformers takes the long factors for a whole batch, by its longest row; vLLM by its own limit."""
    factors = {"short_factor": [1.0] * 64, "long_factor": [4.0] * 64, "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64} | factors
    data, model = {"path": rows_file, "max_prompt_length": 40}, {"rope_parameters": rope}
    with pytest.raises(UserError, match=r"65 tokens together\. Beyond 64, .*longrope.*Lower data\.max_prompt_length"):
        checked(make_tokenizer(), data, model=model, rollout={"max_completion_length": 25})
    assert checked(make_tokenizer(), data, model=model, rollout={"max_completion_length": 24}) == []
    rollout = {"max_completion_length": 24, "backend": "vllm", "vllm_max_model_length": 65}
    with pytest.raises(UserError, match=r"rollout\.vllm_max_model_length: beyond 64 tokens, vLLM takes"):
        checked(make_tokenizer(), data, model=model, rollout=rollout)


def test_tokens_that_the_model_has_no_embedding_for(tmp_path):
    """A tokenizer may have more tokens than its model, as long as no row has one of those."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": letter} for letter in "abcd"])
    (warning,) = checked(make_tokenizer(), {"path": path}, task=True, model={"vocab_size": 20})
    assert "the tokenizer has 51 tokens" in warning
    path = write_rows(tmp_path / "more.jsonl", [{"prompt": letter} for letter in "azbc"])
    with pytest.raises(UserError, match=rf"1 of 4 rows hold tokens that .* no embedding for, such as 31 .*{path}:2"):
        checked(make_tokenizer(), {"path": path}, task=True, model={"vocab_size": 20})


def test_a_chat_template_on_a_base_model(rows_file):
    data = {"path": rows_file, "template": "chat"}
    with pytest.raises(UserError, match=r"no chat template. This looks like a base model: take template: r1_zero"):
        checked(make_tokenizer(), data)
    with pytest.raises(UserError, match=r"ends an answer with '<\|end\|>', but the model stops on <eos>"):
        checked(make_tokenizer(chat=CHAT), data)
    tokenizer = make_tokenizer(chat=CHAT, eos="<|end|>")
    assert checked(tokenizer, data, task=True, model={"eos_token_id": 5}) == []


def test_a_chat_template_that_fails_is_an_error_with_its_words(rows_file):
    broken = make_tokenizer(chat="{{ raise_exception('system role not supported') }}")
    with pytest.raises(UserError, match=r"chat template fails: .*system role not supported"):
        checked(broken, {"path": rows_file, "template": "chat"})


def test_rows_that_the_chat_template_refuses_are_counted(tmp_path):
    conversations = [[{"role": role, "content": "hi"}] for role in ("user", "system", "user", "system")]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": messages} for messages in conversations])
    tokenizer = make_tokenizer(chat=CHAT, eos="<|end|>")
    data = {"path": path, "template": "chat", "system_prompt": "be brief"}
    with pytest.raises(UserError, match=rf"data: 2 of 4 rows can't be used, the first is {path}:2: .*of its own"):
        checked(tokenizer, data, task=True, model={"eos_token_id": 5})
    with pytest.raises(UserError, match=rf"{path}:2: "):
        load(data, tokenizer).train_prompts(0)


@pytest.mark.parametrize("template", ["chat", "tinyzero"])
def test_a_prompt_that_is_rendered_already(tmp_path, template):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ok"}, {"prompt": "<|start|>user : hi<|end|>"}])
    tokenizer = make_tokenizer(chat=CHAT, eos="<|end|>")
    data = {"path": path, "max_prompt_length": 1024}
    with pytest.raises(UserError, match=rf"1 of 2 prompts already hold .*<\|end\|> \(first {path}:2\).*template: none"):
        checked(tokenizer, data | {"template": template}, task=True, model={"eos_token_id": 5}, prompts_per_step=1)
    assert checked(tokenizer, data, task=True, model={"eos_token_id": 5}, prompts_per_step=1) == []


def test_all_problems_are_told_at_once(rows_file):
    with pytest.raises(UserError) as caught:
        checked(
            make_tokenizer(),
            {"path": rows_file, "template": "chat"},
            model={"vocab_size": 3, "max_position_embeddings": 9},
        )
    assert len(str(caught.value).splitlines()) == 3


def test_notes_on_the_rows_are_warnings(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", questions(9) * 2)
    assert checked(make_tokenizer(), {"path": path, "eval_size": 2}, task=True) == [
        "data: 2 rows repeat a held-out question and are left out of training"
    ]


def test_a_model_with_several_parts_is_read_at_its_text():
    text = SimpleNamespace(eos_token_id=3)
    assert stop_token_ids(make_tokenizer(), SimpleNamespace(get_text_config=lambda: text), None) == [3]


def test_a_prompt_of_which_the_tokenizer_makes_nothing_is_refused_by_row(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in ("a", "ÄÖ", "Äa", "ÜÜ", "b", "c")])
    dropping = DroppingTokenizer(make_tokenizer())
    with pytest.raises(
        UserError, match=rf"data: 2 of 6 rows can't be used, the first is {path}:2: the prompt is empty"
    ):
        checked(dropping, {"path": path}, task=True)
    with pytest.raises(UserError, match=rf"{path}:[24]: the prompt is empty"):
        load({"path": path}, dropping, prompts_per_step=6).train_prompts(0)


@pytest.mark.parametrize(("prompt", "template"), [("<bos>", "none"), ("<eos> <|start|><|end|>", "none"), ("x", "chat")])
def test_a_prompt_of_special_tokens_alone_is_refused_by_row(tmp_path, prompt, template):
    chat = "{% if messages[0].content != 'x' %}" + CHAT + "{% endif %}<|end|>"
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": text} for text in ("a", prompt, "<|end|>a" if template == "none" else "b")]
    )
    data = {"path": path, "template": template}
    with pytest.raises(
        UserError, match=rf"data: 1 of 3 rows can't be used, the first is {path}:2: the prompt is empty"
    ):
        checked(make_tokenizer(bos=True, chat=chat), data, task=True, prompts_per_step=3, model={"eos_token_id": 5})


class DroppingTokenizer:
    """A tokenizer without an unknown token: it makes nothing of characters that it does not have."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __len__(self):
        return len(self.tokenizer)

    def encode(self, text, **keywords):
        return self.tokenizer.encode("".join(filter(str.isascii, text)), **keywords)


def test_rows_that_are_too_long_are_dropped_where_the_recipe_says_so(tmp_path):
    rows = [{"prompt": "a" * n, "completion": "b" * n} for n in (8, 11, 30, 9, 10, 7)]
    data = {"path": write_rows(tmp_path / "rows.jsonl", rows), "max_prompt_length": 10, "too_long": "drop"}
    task = load(data)
    assert task.train.ids == [0, 3, 4, 5]
    (note,) = checked(make_tokenizer(), data, task=True)
    assert note == "data: 2 of 6 rows to train on are longer than data.max_prompt_length and are left out"
    short, data["max_prompt_length"] = {"max_completion_length": 9}, 50
    answers = load(data, stage="sft", rollout=short, prompts_per_step=2)
    assert answers.train.ids == [0, 5]  # EOS counts
    with pytest.raises(UserError, match=r"than the 2 rows .*\(data.too_long: drop: 4 of 6 rows"):
        load(data, stage="sft", rollout=short, prompts_per_step=3)


CLOCK = CHAT + "{% if messages[0].content != 'b' %}{{ strftime_now('%d %b %Y') }}{% endif %}"


def test_a_chat_template_that_asks_the_clock_is_told_the_recipes_date(rows_file):
    """So a run that is resumed tomorrow has the prompts of today."""
    tokenizer = make_tokenizer(chat=CLOCK, eos="<|end|>")
    data = {"path": rows_file, "template": "chat", "chat_template_date": "2031-05-06 07:08"}
    (warning,) = checked(tokenizer, data, task=True, model={"eos_token_id": 5})
    assert "asks for today's date (%d %b %Y). It is told 2031-05-06 07:08 (data.chat_template_date)" in warning
    assert load(data, tokenizer).train_prompts(0)[0].text.endswith("assistant :06 May 2031")
    with pytest.raises(ValueError, match=r"expected a date as YYYY-MM-DD, got '6 May'"):
        recipe(data | {"chat_template_date": "6 May"})


@pytest.mark.parametrize("draws", ["{{ range(99999) | random }}", "{{ ['', '.'] | random }}", "{{ lipsum(n=1) }}"])
def test_a_chat_template_that_draws_is_refused(rows_file, draws):
    tokenizer = make_tokenizer(chat=CHAT + draws, eos="<|end|>")
    with pytest.raises(UserError, match="shows the same conversation differently each time"):
        checked(tokenizer, {"path": rows_file, "template": "chat"}, model={"eos_token_id": 5})


LOOP = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("too_long", ["error", "drop"])
def test_a_chat_template_that_loops_for_ever_is_given_up(tmp_path, monkeypatch, too_long):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in ("a", "loop", "loop", "loop")])
    data = {"path": path, "template": "chat", "too_long": too_long}
    always = make_tokenizer(chat=LOOP + CHAT, eos="<|end|>")
    with pytest.raises(UserError, match=r"chat template does not end \(given up after 0.2 s\)"):
        checked(always, data, task=True, model={"eos_token_id": 5})
    for_some = make_tokenizer(
        chat="{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + CHAT, eos="<|end|>"
    )
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*does not end") as refused:
        checked(for_some, data, task=True, model={"eos_token_id": 5})
    assert str(refused.value).count("does not end") == 1  # one is enough
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_chat_template_whose_text_fills_the_memory_is_given_up(rows_file, monkeypatch):
    monkeypatch.setattr(templates, "GIGABYTES", 0.02)
    monkeypatch.setattr(templates, "LOOK", 0.005)
    doubles = "{% set n = namespace(s='x') %}{% for _ in range(28) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    with pytest.raises(UserError, match=r"data.template: .* makes a text of more than 0.02 GB"):
        checked(
            make_tokenizer(chat=doubles + CHAT, eos="<|end|>"),
            {"path": rows_file, "template": "chat"},
            model={"eos_token_id": 5},
        )


BLOCKS = [
    "<think>\n\n</think>\n\n",
    "[THINK] [/THINK]",
    "<|begin_of_thought|><|end_of_thought|>",
    "<Reasoning></Reasoning>",
]


@pytest.mark.parametrize("block", BLOCKS)
def test_an_empty_think_block_is_reported(rows_file, block):
    data, model = {"path": rows_file, "template": "chat"}, {"eos_token_id": 5}
    thinks_for_it = make_tokenizer(
        chat=CHAT.replace("<|start|>assistant :", f"<|start|>assistant :{block}"), eos="<|end|>"
    )
    (warning,) = checked(thinks_for_it, data, model=model)
    assert "puts an empty think block before every answer" in warning
    inner = CHAT.replace("{{ m.content }}", f"{{% if m.role == 'assistant' %}}{block}{{% endif %}}{{{{ m.content }}}}")
    (warning,) = checked(make_tokenizer(chat=inner, eos="<|end|>"), data, model=model)
    assert "shows an answer behind an empty think block" in warning

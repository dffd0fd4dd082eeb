"""Small files of rows, recipes that read them, and a tokenizer of single characters: for the tests of this room."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo.config import Recipe
from grpo.prompts.task import Task, load_task

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }} : {{ m.content }}"
    "{% if not loop.last or add_generation_prompt or m.role != 'assistant' or close is not defined %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant :{% endif %}"
)


def make_tokenizer(bos: bool = False, adds_eos: bool = False, chat: str | None = None, eos: str | None = "<eos>"):
    special = ["<pad>", "<unk>", "<bos>", "<eos>", "<|start|>", "<|end|>"]
    vocabulary = {
        token: index for index, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz0123456789.,:=<>/?!"])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    if bos or adds_eos:
        single = f"{'<bos> ' if bos else ''}$A{' <eos>' if adds_eos else ''}"
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>" if bos else None,
        eos_token=eos,
        additional_special_tokens=["<|start|>", "<|end|>"],
        chat_template=chat,
    )


def recipe(data: dict, stage: str = "grpo", prompts_per_step: int = 4, seed: int = 0, **sections) -> Recipe:
    return Recipe.model_validate(
        {
            "stage": stage,
            "model": {"name": "somewhere"},
            "data": data if "mix" in data else {"eval_size": 0, **data},
            "rewards": [{"name": "countdown"}],
            "training": {"output_dir": "runs/x", "prompts_per_step": prompts_per_step, "seed": seed},
            **sections,
        }
    )


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(n: int) -> list[dict]:
    return [{"prompt": f"what is {i} ?", "answer": str(i)} for i in range(n)]


def load(data: dict, tokenizer=None, **keywords) -> Task:
    """The task of ``recipe(data, **keywords)``."""
    made = recipe(data, **keywords)
    return load_task(made, tokenizer or make_tokenizer())

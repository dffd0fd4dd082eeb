"""Models from a GGUF file: weights de-quantized into an ordinary trainable model.

``python -m grpo.model.gguf FILE FOLDER`` writes such a model as a folder that ``from_pretrained`` loads, and checks it.
A recipe needs no conversion: its ``model.name`` may be the GGUF file itself. The folder loads faster, and tools that do
not know GGUF can read it too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import UserError, printable
from grpo.files import whole_folder

# Where a tokenizer rebuilt from GGUF could differ: runs of spaces, digits, tags, letters outside of ASCII.
ROUND_TRIPS = (
    "Hello  world,\n\n  3 + 4 = 7; 1234",
    "<think> a </think>\n<answer>(3 + 4) * 2</answer>",
    "Übung, naïve, é",
)


def whole(model: PreTrainedModel, loading_info: dict[str, Any]) -> PreTrainedModel:
    """The model, if it has all its weights: ``from_pretrained`` fills what is missing with random numbers. Raises
    ValueError."""
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(
            f"{len(missing)} of the weights that its configuration asks for are not there, such as {missing[0]}; "
            "they would be random numbers"
        )
    return model


def load_gguf(file: Path, dtype: torch.dtype = torch.float32, **keywords: Any) -> PreTrainedModel:
    """The causal LM of a GGUF file with all weights in ``dtype``; ``keywords`` go to ``from_pretrained``.

    Raises OSError, ValueError or ImportError, as ``from_pretrained`` does.
    """
    if hasattr(transformers, "GgufConfig"):  # where it exists, the default is packed weights, which can't be trained
        keywords["quantization_config"] = transformers.GgufConfig(dequantize=True)
    keywords |= {"gguf_file": file.name, "dtype": dtype, "output_loading_info": True}
    model = whole(*AutoModelForCausalLM.from_pretrained(str(file.parent), **keywords))
    # Nothing is quantized any more, but save_pretrained would refuse while these attributes say so.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model (float32) and tokenizer to ``folder``, which is replaced once all checks pass.

    Raises UserError where something did not survive saving and loading.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = load_gguf(file)
    with whole_folder(folder) as written:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        check_weights(model, AutoModelForCausalLM.from_pretrained(written))
        check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(written))


def check_weights(model: PreTrainedModel, saved: PreTrainedModel) -> None:
    """Raise UserError unless both models hold the same numbers under the same names."""
    tensors = saved.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in tensors or not torch.equal(tensor, tensors[name]):
            raise UserError(f"the weights {name} did not survive saving and loading")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, saved: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless texts survive encoding and decoding, the same after saving, and an end token is named."""
    for text in ROUND_TRIPS:
        ids = saved.encode(text, add_special_tokens=False)
        if ids != tokenizer.encode(text, add_special_tokens=False) or saved.decode(ids) != text:
            raise UserError(f"the tokenizer does not give back {text!r} but {saved.decode(ids)!r}")
    if saved.eos_token_id is None:
        raise UserError("the tokenizer names no end-of-sequence token")
    if saved.chat_template != tokenizer.chat_template:
        raise UserError("the chat template did not survive saving and loading")


def ask(folder: Path, question: str, max_new_tokens: int = 64) -> tuple[str, bool]:
    """The greedy answer to a chat message, and whether it ended by the model's end-of-sequence token."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise UserError(f"{folder} has no chat template: a base model answers no questions")
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output_T = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0]
    answer = tokenizer.decode(output_T[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, output_T[-1].item() == tokenizer.eos_token_id


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo.model.gguf", description="Write a GGUF file as a model folder."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a GGUF file")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write the model; replaced if it exists")
    parser.add_argument("--ask", metavar="QUESTION", help="print the converted model's greedy answer")
    parser.add_argument("--expect", metavar="WORD", help="fail unless the answer holds this word and comes to an end")
    arguments = parser.parse_args()
    try:
        convert(arguments.file, arguments.folder)
        if arguments.ask:
            answer, ended = ask(arguments.folder, arguments.ask)
            print(printable(f"{arguments.ask} -> {answer}"))
            if arguments.expect and (arguments.expect not in answer or not ended):
                raise UserError(f"expected {arguments.expect!r} in an answer that ends; the conversion went wrong")
    except (UserError, OSError, ValueError, ImportError) as error:
        sys.exit(f"{arguments.file}: {error}")
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()

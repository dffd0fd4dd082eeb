"""A configuration of TRL's becomes a recipe. The command takes ``conversion.convert``, and ``write``, which reads such
a file and puts into words what became of it.

``keys.py`` sorts every key of TRL's into those that are carried over, those that are computed with (in ``model.py``,
``sampling.py`` and ``length.py``) and those that have no place here, each with its reason. Names, defaults and
meanings are those of TRL 1.16's ``trl grpo`` and ``trl sft`` (GRPOConfig, SFTConfig, ModelConfig, the script's
arguments) over transformers 5's TrainingArguments.
"""

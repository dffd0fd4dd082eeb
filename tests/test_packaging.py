"""The wheel holds the four packages with their data files, and nothing else; versions and pins agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import grpo

ROOT = Path(__file__).parents[1]
SHIPPED = {
    "grpo": ("*.py", "*.css", "*.cpp", "*.h", "*.yaml"),
    "rewards": ("*.py",),
    "data": ("*.py", "tiny_base/*"),
    "recipes": ("*.py", "*.yaml"),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that neither build leftovers of the checkout nor a parallel test get in."""
    source = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "grpo", "rewards", "data", "recipes", "tests"):
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source]
    done = subprocess.run(build, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (source / "dist").glob("grpo_train-*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


@pytest.mark.slow
def test_the_wheel_holds_what_it_should_and_nothing_else(wheel):
    expected = {
        file.relative_to(ROOT).as_posix()
        for package, patterns in SHIPPED.items()
        for pattern in patterns
        for file in (ROOT / package).rglob(pattern)
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"grpo/cli/main.py", "recipes/smoke_cpu.yaml", "data/tiny_base/model.safetensors"} <= expected
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = message_from_string(wheel.read(f"{info}/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("grpo-train", grpo.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "grpo = grpo.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert wheel.read(f"{info}/top_level.txt").decode().split() == ["data", "grpo", "recipes", "rewards"]


@pytest.mark.slow
def test_recipes_are_found_by_name_from_the_wheel(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    wheel.extractall(installed)
    elsewhere.mkdir()

    def grpo_command(*arguments: str) -> str:
        command = [sys.executable, "-m", "grpo", *arguments]
        environment = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "\nsmoke_cpu " in grpo_command("recipes")
    grpo_command("recipes", "copy", "smoke_cpu", "mine.yaml")
    assert (elsewhere / "mine.yaml").read_bytes() == (ROOT / "recipes" / "smoke_cpu.yaml").read_bytes()
    assert grpo_command("recipes", "show", "smoke_cpu") == (elsewhere / "mine.yaml").read_text()


@pytest.mark.slow
def test_every_dependency_has_a_tested_pin_within_its_range(wheel):
    (metadata_file,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_string(wheel.read(metadata_file).decode())
    untested = {"trackio", "grpo-train"}
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    for requirement in (r for r in needed if r.name not in untested):
        versions = pins().get(canonicalize_name(requirement.name))
        assert versions, f"constraints.txt does not pin {requirement.name}"
        assert all(requirement.specifier.contains(v) for v in versions), f"{requirement} excludes the tested {versions}"


def test_every_line_of_the_constraints_is_one_version():
    for line in constraint_lines():
        assert re.fullmatch(r'[\w.-]+==[\w.]+( ; python_version (<|>=) "3\.\d+")?', line), line
    assert pins()["torch"] == ["2.13.0"]


def constraint_lines():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins():
    found: dict[str, list[str]] = {}
    for line in constraint_lines():
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), []).append(str(requirement.specifier).removeprefix("=="))
    return found


@pytest.mark.parametrize(
    ("minor", "targets"), [(10, "lint test test-processes"), (11, "lint test test-processes test-vllm")]
)
def test_ci_leaves_out_what_an_older_python_cannot_run(tmp_path, minor, targets):
    """With stand-ins for make and python3 that say what they are told to."""
    stand_ins = {
        "make": f'echo "$@" >> {tmp_path}/targets',
        "python3": f'[ "$1" = -c ] && exec {sys.executable} -c "import sys; sys.version_info = (3, {minor}); $2"\n'
        f"echo Python 3.{minor}.0",
    }
    (tmp_path / "bin").mkdir()
    for name, script in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", tmp_path / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "targets").read_text().split() == targets.split()
    assert ("left out: vLLM needs Python 3.11" in done.stdout) == (minor == 10)

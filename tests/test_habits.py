"""Habits that no other tool keeps: what may lie in the checkout, what a wheel carries, what the pins say."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]
LIMIT = 100_000  # bytes
TABLE_8 = "results/measured/mimae_t8_short"
LARGE = {  # rightly larger, each with its reason
    "results/reported/ncmi.csv",  # the 776 numbers of one paper
    # 10,000 images' outcomes under eight attacks
    *(
        f"results/measured/mimae_t8_short/{cell}/seed0/record.npz"
        for cell in ("standard_at", "trades", "mart", "mimae")
    ),
}

# A bracket keeps a pattern from finding itself in this file.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.}-])/(work|root|home)/",
    "a package host": r"python[h]osted|pypi[.]org|np[m]js|deb[.]debian|download[.]pytorch",
    "unfinished work": r"\b(TO[D]O|FIX[M]E|XX[X])\b",
}


@cache
def _files() -> list[str]:
    """Every file that git tracks or would add, as a path relative to the checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in set(listed.split("\0")) if name and (REPO / name).is_file())


def _named(pattern: str) -> list[str]:
    return [name for name in _files() if Path(name).match(pattern)]


# ---------------------------------------------------------------- the checkout
@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_contains(what: str) -> None:
    found = []
    for name in _files():
        text = (REPO / name).read_bytes()
        if b"\0" in text:
            continue
        for number, line in enumerate(text.decode("utf-8").splitlines(), 1):
            if re.search(FORBIDDEN[what], line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, f"{what}:\n" + "\n".join(found)


def test_no_large_file() -> None:
    sizes = {name: (REPO / name).stat().st_size for name in _files()}
    assert {name: size for name, size in sizes.items() if size > LIMIT and name not in LARGE} == {}


def test_notebooks_are_stripped() -> None:
    dirty = []
    for name in _named("*.ipynb"):
        for cell in json.loads((REPO / name).read_text())["cells"]:
            if cell.get("outputs") or cell.get("execution_count"):
                dirty.append(name)
    assert sorted(set(dirty)) == [], "clear their outputs: jupyter nbconvert --clear-output --inplace <file>"


@pytest.mark.parametrize("name", [name for name in _files() if name.startswith("conf/")])
def test_configuration_parses(name: str) -> None:
    assert name.endswith(".yaml"), f"{name}: Hydra finds only files that end in .yaml"
    assert isinstance(yaml.safe_load((REPO / name).read_text()), dict | None), f"{name} is not a mapping"


@pytest.mark.parametrize("folder", ["mi_at", "tests", "benchmarks"])
def test_modules_say_what_they_are(folder: str) -> None:
    modules = [name for name in _files() if name.startswith(f"{folder}/") and name.endswith(".py")]
    silent = [name for name in modules if not ast.get_docstring(ast.parse((REPO / name).read_text()))]
    assert silent == []


# ---------------------------------------------------------------- pins, hooks, Makefile
def _normal(requirement: str) -> str:
    """The bare, normalised name of a requirement: `Foo_bar[x]>=1` is foo-bar."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement.strip())[0]).lower()


def test_every_requirement_is_pinned() -> None:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)] == []
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    missing = {_normal(name) for name in wanted} - {_normal(pin) for pin in pins} - {"mi-at"}
    assert missing == set(), "run `make constraints`"


def test_torch_and_torchvision_are_pinned_as_a_pair() -> None:
    pins = (REPO / "constraints.txt").read_text().splitlines()
    # Another pair must be tried on a machine without a GPU first: not every torchvision imports there.
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= set(pins)


def test_hooks_fetch_nothing() -> None:
    repos = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}


def test_make_help_lists_every_target() -> None:
    text = (REPO / "Makefile").read_text()
    targets = {name for line in re.findall(r"^\.PHONY: (.*)$", text, re.M) for name in line.split()}
    listed = subprocess.run(["make", "-s", "help"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == targets - {"check-venv"}


# ---------------------------------------------------------------- the wheel
@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with what is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPO)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_carries_code_and_configuration(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in _files() if name.startswith(("mi_at/", "hydra_plugins/"))}
    conf = {f"mi_at/{name}" for name in _files() if name.startswith("conf/")}
    assert {name for name in inside if ".dist-info/" not in name} == code | conf


@pytest.mark.slow
def test_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(installed), str(wheel)], check=True)
    # In front of the checkout, which an editable installation may have put on the path.
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert Path(run("-c", "import mi_at; print(mi_at.__file__)").strip()).is_relative_to(installed)
    job = yaml.safe_load(run("-m", "mi_at.train", "--cfg", "job"))
    assert job["dataset"]["name"] == "digits"
    assert list(elsewhere.iterdir()) == [], "showing the configuration leaves files behind"

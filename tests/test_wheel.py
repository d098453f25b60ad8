"""The wheel holds everything: it works in an empty environment, far from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(command, *arguments)`: what a command of an environment that holds the wheel prints."""
    root = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(root / "dist")]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True, timeout=300)
    (wheel,) = (root / "dist").glob("*.whl")

    venv.create(root / "env", symlinks=os.name != "nt")
    scripts = Path(sysconfig.get_path("scripts", "venv", {"base": str(root / "env")}))
    target = Path(sysconfig.get_path("purelib", "venv", {"base": str(root / "env"), "platbase": str(root / "env")}))
    install = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--quiet", "--no-deps"]
    options = ["--no-index", "--disable-pip-version-check"]
    subprocess.run([*install, *options, str(wheel)], check=True, capture_output=True, timeout=300)
    # The heavy packages are shared by path. A folder named in a .pth file gives its packages but its own .pth files,
    # among them the one of the editable install, are not read; and the environment's own folder comes first.
    (target / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")

    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}

    def of(command: str, *arguments: str) -> str:
        line = [str(scripts / command), *arguments]
        done = subprocess.run(
            line, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return of


def test_the_installed_package_is_imported_and_not_the_checkout(run: Run) -> None:
    place = Path(run("python", "-c", "import vlm; print(vlm.__file__)").strip())
    assert "site-packages" in place.parts
    assert CHECKOUT not in place.parents


def test_the_commands_answer(run: Run) -> None:
    for command in ("vlm", "vlm-train", "vlm-eval"):
        assert "Usage" in run(command, "--help")


def test_what_travels_with_the_library_is_found_by_name(run: Run) -> None:
    def shipped(folder: str) -> list[str]:
        root = CHECKOUT / folder
        return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))

    assert run("vlm-train", "--list").split() == shipped("recipes")
    assert json.loads(run("vlm-eval", "--list", "--json")) == shipped("eval")
    assert [row["name"] for row in json.loads(run("vlm", "data", "list", "--json"))] == shipped("datasets")
    assert [row["name"] for row in json.loads(run("vlm", "recipes", "--json"))] == shipped("recipes")


def test_a_shipped_recipe_loads_by_name(run: Run) -> None:
    code = "from vlm import load_recipe; print(load_recipe('starter/llava_pretrain', ['train.steps=7']).train.steps)"
    assert run("python", "-c", code).strip() == "7"


def test_the_report_template_is_in_the_wheel(run: Run) -> None:
    code = "from vlm.evaluation import report; print(report._TEMPLATE.is_file())"
    assert run("python", "-c", code).strip() == "True"

"""Run the benchmarks and write their report; `make bench`, or `make bench ONLY="encode rerank"`.

First the peers that have an environment of their own are set up (`peers/NAME.sh FOLDER BASE`). One that cannot be is
named and does not end the rest, nor does a script that fails or takes too long; earlier results of what was not run now
stay in the report.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import report

FOLDER = Path(__file__).resolve().parent
SECONDS = 600  # that a script may take
SETUP_SECONDS = 900


def scripts() -> dict[str, Path]:
    """Benchmarks by name: the files here that run by themselves, this one and the report's aside."""
    files = [p for p in sorted(FOLDER.glob("*.py")) if p.stem not in ("run", "report", "harness")]
    return {path.stem: path for path in files if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")}


def run_all(names: Sequence[str], environments: str, base: str, seconds: float = SECONDS) -> list[str]:
    """Set peers up, run the scripts of these names; returns what went wrong, a line each."""
    problems = []
    peers = {}  # environment variables that tell the scripts where
    for peer in sorted((FOLDER / "peers").glob("*.sh")):
        folder = Path(f"{environments}-{peer.stem}").resolve()
        peers[f"VLM_BENCH_{peer.stem.upper()}"] = str(folder)
        if problem := _run(f"peers/{peer.name}", ["bash", str(peer), str(folder), base], SETUP_SECONDS, {}):
            problems.append(problem)
    for name in names:
        if problem := _run(f"{name}.py", [sys.executable, str(scripts()[name])], seconds, peers):
            problems.append(problem)
    return problems


def _run(name: str, command: list[str], seconds: float, told: dict[str, str]) -> str:
    """What went wrong, in words; nothing if all is well."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    path = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **told, "PYTHONPATH": path}
    process = subprocess.Popen(command, cwd=FOLDER.parent, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return f"{name}: stopped after {seconds:.0f} seconds; the cases it had measured are kept"
    print(f"   {time.monotonic() - start:.0f} seconds", flush=True)
    return f"{name}: failed with exit status {status}" if status else ""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of: {', '.join(scripts())}; all by default")
    parser.add_argument("--environments", default=".venv", help="peers' environments are this name, - and theirs")
    parser.add_argument("--base", default=".venv", help="the environment that the library is installed in")
    options = parser.parse_args()
    if unknown := set(options.names) - set(scripts()):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; known: {', '.join(scripts())}")
    problems = run_all(options.names or list(scripts()), options.environments, options.base)
    report.main()
    for problem in problems:
        print(f"! {problem}")
    return 1 if any(".py:" in problem for problem in problems) else 0


if __name__ == "__main__":
    sys.exit(main())

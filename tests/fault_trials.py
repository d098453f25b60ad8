"""Work that is killed at random moments until it is done: imports once, then forks a trial, which is far quicker.

    python fault_trials.py train RECIPE FOLDER SEED,SEED,...
    python fault_trials.py evaluate BENCHMARK MODEL FOLDER SEED,SEED,...

Each seed has its own cache and output, `FOLDER/cache-SEED` and `FOLDER/run-SEED`; what is left alone ends in
`FOLDER/run-through`.
"""

import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

KILLS = 2


def in_a_child(work: Callable[[], None]) -> int:
    """The process id of a child that does `work`; its exit status is 0 if that went well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def trials(work: Callable[[str], Callable[[], None]], folder: str, seeds: list[str]) -> None:
    """Do the work of each seed, killed at KILLS moments that the seed decides, then left to end."""
    os.environ["VLM_CACHE"] = f"{folder}/cache-through"
    began = time.monotonic()
    assert os.waitpid(in_a_child(work("through")), 0)[1] == 0
    whole = time.monotonic() - began
    for seed in seeds:
        os.environ["VLM_CACHE"] = f"{folder}/cache-{seed}"
        chance = random.Random(int(seed))
        for _ in range(KILLS):
            child = in_a_child(work(seed))
            time.sleep(chance.uniform(0, whole))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert status in (0, signal.SIGKILL), f"seed {seed}: an error, not a kill"
        assert os.waitpid(in_a_child(work(seed)), 0)[1] == 0, f"seed {seed}"


def main(kind: str, *arguments: str) -> None:
    """One kind of work."""
    warnings.simplefilter("ignore")
    import torch

    import vlm.training.loop  # noqa: F401

    torch.set_num_threads(1)
    *files, folder, seeds = arguments

    if kind == "train":
        from vlm import load_recipe, train

        def work(seed: str) -> Callable[[], None]:
            recipe = load_recipe(files[0], [f"output={folder}/run-{seed}"])
            return lambda: print(train(recipe, resume=True, quiet=True).finished, file=sys.stderr)
    else:
        from vlm import load_model
        from vlm.evaluation import evaluate

        model = load_model(files[1])

        def work(seed: str) -> Callable[[], None]:
            output = f"{folder}/run-{seed}"
            return lambda: print(
                evaluate(files[0], model, model_name="tiny", output=output, batch_size=2, progress=False).score,
                file=sys.stderr,
            )

    trials(work, folder, seeds.split(","))
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Every task is shared by processes and goes on after a kill, with the results of a run left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from PIL import Image

TASKS = ("vqa", "caption", "retrieval", "matching", "zero_shot")

# Evaluates each benchmark in children of its own, killed at a call of the model, while its answers are written, or
# before a file of results appears.
SCRIPT = """
import os, pathlib, signal, sys
import torch
from vlm.evaluation import evaluate, responses
from vlm.data.images import load_image

torch.set_num_threads(1)
folder, kills = sys.argv[1], sys.argv[2].split(",")
calls = 0

def count(what, inputs):
    global calls
    calls += 1
    with open(f"{folder}/asked.txt", "a") as log:
        log.writelines(f"{task} {os.environ.get('RANK', 0)} {what} {one}\\n" for one in inputs)
    if kill == f"call {calls}":
        os.kill(os.getpid(), signal.SIGKILL)

def brightness(images):
    return torch.tensor([float(sum(load_image(image).getpixel((0, 0)))) for image in images])

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def answer(self, images, questions, **decoding):
        count("answer", images)
        return [f"{value:.0f}" for value in brightness(images)]

    def caption(self, images, prompt=None, **decoding):
        count("caption", images)
        return [f"a picture of {value:.0f}" for value in brightness(images)]

    def encode_image(self, images):
        count("image", images)
        return torch.nn.functional.normalize(torch.stack([brightness(images).cos(), brightness(images).sin()], 1))

    def encode_text(self, texts):
        count("text", texts)
        values = torch.tensor([float(text.split()[-1]) for text in texts])
        return torch.nn.functional.normalize(torch.stack([values.cos(), values.sin() * 0.8], 1))

    def match_each(self, images, texts, wanted):
        count("match", images)
        values = torch.tensor([float(text.split()[-1]) for text in texts])
        apart = [(values[numbers] - value).abs() for value, numbers in zip(brightness(images), wanted)]
        return [torch.stack([far, 15 - far], 1) for far in apart]

    def classify(self, images, labels, templates=None):
        count("classify", images)
        return -(brightness(images)[:, None] - torch.tensor([float(label) for label in labels])).abs()

def run():
    evaluate(f"{folder}/{task}.yaml", Model(), output=f"{folder}/{task}", batch_size=2, progress=False)

def dying_write(self, said, at=[0], add=responses.Responses.add):
    at[0] += bool(said)
    add(self, said)
    if kill == f"write {at[0]}":
        self._open.truncate(os.path.getsize(self.file) - 9)
        os.kill(os.getpid(), signal.SIGKILL)

def dying_rename(self, target, at=[0], rename=pathlib.Path.replace):
    at[0] += str(target).startswith(f"{folder}/{task}/")
    if kill == f"rename {at[0]}":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

responses.Responses.add = dying_write
pathlib.Path.replace = dying_rename
for task in sys.argv[3].split(","):
    for turn, kill in enumerate(kills):
        if len(kills) == 1:
            run()
        elif (child := os.fork()) == 0:
            run()
            os._exit(0)
        else:
            _, status = os.waitpid(child, 0)
            assert status == (signal.SIGKILL if kill else 0) or turn >= 4 or len(sys.argv) > 4
            with open(f"{folder}/asked.txt", "a") as log:
                log.write(f"{task} run ends\\n")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of each task about the same nine pictures, one of them broken."""
    tmp_path = tmp_path_factory.mktemp("tasks")
    values = [n * 30 for n in range(9)]
    captions, classes = tmp_path / "captions.jsonl", tmp_path / "classes"
    questions = tmp_path / "questions.json"
    rows, asked = [], []
    for number, value in enumerate(values):
        path = classes / str(value) / f"{number}.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4), (value, 0, 0)).save(path)
        told = [f"one of {value}", f"something as bright as {value + 10}"]
        rows.append(json.dumps({"image": str(path), "captions": told}))
        asked.append({"id": f"q{number}", "image": str(path), "question": "how bright " + "very " * (number * 7 % 5)})
    (classes / "60" / "2.png").write_bytes(b"no picture")
    captions.write_text("\n".join(rows))
    data = {
        "caption": ("captions_jsonl", captions),
        "retrieval": ("captions_jsonl", captions),
        "zero_shot": ("image_folder", classes),
    }
    content = [
        {"question_id": n, "image_id": n, "question": row["question"], "answer": str(values[n])}
        for n, row in enumerate(asked)
    ]
    questions.write_text(
        json.dumps({"data": [{**row, "image_id": f"{row['image_id']}", "answers": [row["answer"]]} for row in content]})
    )
    pictures = tmp_path / "jpg"
    pictures.mkdir()
    for number, value in enumerate(values):
        (pictures / f"{number}.jpg").write_bytes((classes / str(value) / f"{number}.png").read_bytes())
    data["vqa"] = ("textvqa", questions)
    for task, (format, path) in data.items():
        images = f", images: {pictures}" if task == "vqa" else ""
        (tmp_path / f"{task}_data.yaml").write_text(
            f"name: {task}_data\nlicence: MIT\nformat: {format}\nsplits: {{test: {{path: {path}{images}}}}}\n"
        )
    for task in TASKS:
        more = {"vqa": "protocol: exact", "retrieval": "rerank: 3"}.get(task, "")
        file = "caption" if task == "matching" else task
        (tmp_path / f"{task}.yaml").write_text(
            f"name: {task}\ntask: {task}\ndataset: {tmp_path / f'{file}_data.yaml'}\n{more}\n"
        )
    return tmp_path


Results = dict[str, tuple[bytes, dict]]


def run(
    folder: Path, name: str, kills: tuple[str, ...], launcher: tuple[str, ...] = (), more: tuple[str, ...] = ()
) -> Results:
    """Results of each task (samples.jsonl, and results.json but for what a clock and a place say)."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, str(script), str(folder), ",".join(kills), ",".join(TASKS), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLM_CACHE": str(folder / f"cache {name}")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    (folder / "asked.txt").unlink(missing_ok=True)
    subprocess.run(command, env=environment, timeout=300, check=True)
    found = {}
    for task in TASKS:
        results = json.loads((folder / task / "results.json").read_text())
        kept = {key: value for key, value in results.items() if key != "seconds"}
        found[task] = ((folder / task / "samples.jsonl").read_bytes(), kept)
        for file in (folder / task).iterdir():
            file.unlink()
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> Results:
    return run(folder, "alone", ("",))


def test_a_task_killed_anywhere_goes_on_and_ends_as_one_left_alone(folder: Path, alone: Results) -> None:
    # The last one of each task is left to end; not all have as many calls left as the two before it ask for.
    kills = ("call 1", "write 1", "call 3", "write 3", "call 3", "call 4", "")
    killed = run(folder, "killed", kills)
    for task in TASKS:
        assert killed[task] == alone[task], task
    lines = (folder / "asked.txt").read_text()
    for task in TASKS:
        *earlier, last, _ = lines.split(f"{task} run ends\n")
        before, again = (
            {line.split(" ", 2)[2] for line in part.splitlines() if line.startswith(f"{task} 0")}
            for part in ("".join(earlier), last)
        )
        assert len(before) >= 6, task
        assert len(before - again) >= 4, task  # of two batches the answers were kept


def test_wherever_it_is_killed_the_results_are_those_of_one_left_alone(folder: Path, alone: Results) -> None:
    """Some kills come too late for a task: it has ended already, or has no such call left."""
    random = Random(0)
    kills = ["rename 2", *(f"{random.choice(['call', 'write', 'rename'])} {random.randint(1, 3)}" for _ in range(3))]
    random.shuffle(kills)
    killed = run(folder, "random", (*kills, ""), more=("any",))
    for task in TASKS:
        assert killed[task] == alone[task], (task, kills)


def test_processes_share_every_task_and_ask_nothing_twice(folder: Path, alone: Results) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
    assert run(folder, "shared", ("",), launcher) == alone
    lines = (folder / "asked.txt").read_text().splitlines()
    for task in TASKS:
        asked = [line.split(" ", 2) for line in lines if line.startswith(f"{task} ")]
        whole = [what for _, _, what in asked if not what.endswith("2.png")]
        if task in ("caption", "zero_shot"):  # asked a second time without the broken one in its batch
            assert len(whole) <= len(set(whole)) + 1
        assert {rank for _, rank, _ in asked} == {"0", "1", "2"}
        if task == "retrieval":
            texts = [what for what in whole if what.startswith("text")]
            assert len(texts) == len(set(texts)) == 18
        assert len(set(whole)) >= 8

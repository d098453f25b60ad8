"""What only Java does: CoreNLP's own tokeniser, METEOR 1.5 and SPICE, from the package pycocoevalcap."""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm.errors import VlmError
from vlm.evaluation.ptb import PUNCTUATION

_TOKENISER = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR = "meteor/meteor-1.5.jar"
_SPICE_MODELS = "spice/lib/stanford-corenlp-3.6.0-models.jar"


def java_ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """The official tokenisation: CoreNLP 3.4.1, lower case, punctuation dropped; words joined by spaces.

    CoreNLP sees the captions as lines of one text, so the first letter of the next one can decide on a last period.
    """
    jar = _file(_TOKENISER, "the Java tokeniser")
    lines = [" ".join(caption.split()) for caption in captions]  # no line break of any kind is left
    text = "\n".join(lines).encode("utf-8", errors="replace")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    done = _run([*command, "-preserveLines", "-lowerCase"], text)
    tokens = done.decode("utf-8").split("\n")[: len(lines)]
    if len(tokens) != len(lines):
        raise VlmError(f"CoreNLP's tokeniser gave {len(tokens)} lines for {len(lines)} captions")
    return [" ".join(word for word in line.split() if word not in PUNCTUATION) for line in tokens]


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """METEOR 1.5 (Denkowski and Lavie 2014) of the corpus and of each caption [M]; texts are tokenised already."""
    jar = _file(_METEOR, "METEOR")
    # In a locale with decimal commas METEOR misreads its own numbers.
    command = ["java", "-Duser.language=en", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(line: str, answers: int) -> list[str]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return [process.stdout.readline().strip() for _ in range(answers)]

        try:
            statistics = [
                ask(" ||| ".join(["SCORE", *map(_field, others), _field(caption)]), 1)[0]
                for caption, others in zip(candidates, references, strict=True)
            ]
            *single, corpus = ask(" ||| ".join(["EVAL", *statistics]), len(statistics) + 1)
            return float(corpus), np.array([float(score) for score in single])
        except (OSError, ValueError) as error:
            raise VlmError(f"METEOR stopped: {error}; does `java -jar {jar}` run?") from error
        finally:
            process.kill()


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """SPICE (Anderson et al. 2016) of the corpus and of each caption [M]; texts are tokenised already.

    Raises VlmError unless its parser's models are there: pycocoevalcap fetches them (400 MB) when it is asked to.
    """
    models = _file("spice/spice-1.0.jar", "SPICE").parents[1] / _SPICE_MODELS
    if not models.is_file():
        fetch = "python -c 'from pycocoevalcap.spice.get_stanford_models import get_stanford_models as g; g()'"
        raise VlmError(f"SPICE needs CoreNLP 3.6's models, which are not at {models}; fetch them with: {fetch}")
    from pycocoevalcap.spice.spice import Spice

    numbered = list(range(len(candidates)))
    try:
        score, rows = Spice().compute_score(
            {n: list(others) for n, others in zip(numbered, references, strict=True)},
            {n: [caption] for n, caption in zip(numbered, candidates, strict=True)},
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise VlmError(f"SPICE stopped: {error}; it runs on Java 8 to 11") from error
    return float(score), np.array([float(row["All"]["f"]) for row in rows])


def _field(text: str) -> str:
    return " ".join(text.replace("|||", "").split())


def _file(name: str, what: str) -> Path:
    """A file of pycocoevalcap. Raises VlmError that says what to install."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise VlmError(f'{what} needs the package pycocoevalcap; run: pip install "vlm[coco-java]"')
    if shutil.which("java") is None:
        raise VlmError(f"{what} runs on Java, and there is no `java` on the path; install a runtime (17 is tested)")
    spec = importlib.util.find_spec("pycocoevalcap.tokenizer")
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = Path(folder).parent / name
        if path.is_file():
            return path
    raise VlmError(f'{what}: pycocoevalcap is installed without its file {name}; run: pip install "vlm[coco-java]"')


def _run(command: list[str], text: bytes) -> bytes:
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    if done.returncode:
        problem = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
        raise VlmError(f"{' '.join(command[:1])} ended with status {done.returncode}: {problem[-1] if problem else ''}")
    return done.stdout

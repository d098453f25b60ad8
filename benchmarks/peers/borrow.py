"""Link distributions of the running Python's environment, with all they need, into another one.

python borrow.py FOLDER NAME...    numpy and pillow are left to the other environment, whose packages may need old ones.
"""

import re
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

LEFT_OUT = {"numpy", "pillow", "setuptools"}


def needed(names: list[str]) -> set[str]:
    """The names, and whatever of this environment they require in turn; extras are not followed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or name in LEFT_OUT:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            if name in names:
                raise
            continue  # a requirement of another platform
        found.add(name)
        waiting += [re.split(r"[\s\[;<>=!~(]", text, maxsplit=1)[0] for text in requires if "extra ==" not in text]
    return found


def main() -> None:
    """Link, and put the folder of links behind the other environment's own packages."""
    folder = Path(sys.argv[1]).resolve()
    links = folder / "borrowed"
    links.mkdir()
    for name in needed(sys.argv[2:]):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            place, link = Path(str(distribution(name).locate_file(top))), links / top
            if place.exists() and not link.exists():
                link.symlink_to(place)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    assert version in site.parts, site
    (site / "zz_borrowed.pth").write_text(f"{links}\n")


if __name__ == "__main__":
    main()

"""Miniature copies of the data sets that travel with the library: the files as their authors publish them.

`COPIES`: data set -> what lies at the addresses of its YAML file (an archive as a mapping of its members), what comes
by hand (place in the data folder -> content), and what the reader has to make of it.
"""

from copies_of_captions import CAPTIONS
from copies_of_classes_and_talks import CLASSES_AND_TALKS
from copies_of_exams import EXAMS
from copies_of_questions import QUESTIONS
from published_files import Copy

COPIES: dict[str, Copy] = CAPTIONS | QUESTIONS | EXAMS | CLASSES_AND_TALKS

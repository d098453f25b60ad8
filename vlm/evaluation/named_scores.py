"""What the metrics return: scores by name, as a mapping."""

from collections.abc import Iterator, Mapping


class NamedScores(Mapping[str, float]):
    """Base of a metric's result; a subclass adds what each sample contributed."""

    scores: dict[str, float]

    def __getitem__(self, key: str) -> float:
        return self.scores[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

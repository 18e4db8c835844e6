"""What is wrong with a data set, gathered kind by kind and told in one message."""

from collections.abc import Sequence

from utils.errors import UserError


def listing(names: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """The first `limit` names, and how many more there are."""
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return separator.join([*names[:limit], *more])


class DataError(UserError):
    """What `Faults` gathered, of so many kinds."""

    def __init__(self, message: str, kinds: int):
        super().__init__(message)
        self.kinds = kinds


class Faults:
    """A list of names for each kind of fault; a kind is what is wrong and what to do about it."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], list[str]] = {}

    def add(self, what: str, remedy: str, name: object) -> None:
        self._names.setdefault((what, remedy), []).append(str(name))

    def raise_if_any(self, headline: str) -> None:
        """Raises a DataError with one paragraph a kind, unless nothing was added."""
        if self._names:
            kinds = [
                f"  {what} ({len(names)}): {listing(names)}\n    {remedy}"
                for (what, remedy), names in self._names.items()
            ]
            raise DataError("\n".join([headline, *kinds]), len(kinds))

"""Print the lines of requirements files that this environment does not satisfy; exit code 1 if there are any."""

import re
import sys
from importlib import metadata
from pathlib import Path


def numbers(version: str) -> tuple[int, ...]:
    """``2.15.0+cpu`` -> (2, 15, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def satisfied(requirement: str) -> bool:
    """Whether ``name>=low,<high`` is installed in such a version."""
    name, bounds = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
    try:
        version = numbers(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
    tests = {">=": version.__ge__, "<": version.__lt__}
    return all(tests[sign](numbers(bound)) for sign, bound in re.findall(r"(>=|<)\s*([\w.]+)", bounds))


lines = [line.partition("#")[0].strip() for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
missing = [line for line in lines if line and not satisfied(line)]
print(*missing, sep="\n", end="\n" * bool(missing))
sys.exit(bool(missing))

"""Whether tensors of a file are those that are needed, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toast.files.json_files import few

Shapes = Mapping[str, Sequence[int]]


def refuse_misfits(
    what: str, expected: Shapes, given: Shapes, to: str = "this model", advice: str = ""
) -> None:
    """Refuses tensors that are missing, unexpected or of another shape.

    Args:
        what: What holds the tensors, for the message.
        expected: The shapes that are needed, by name.
        given: The shapes that came.
        to: What they have to fit.
        advice: What to do, a sentence behind a space.

    Raises:
        ValueError: If some do not fit; it lists the first of each kind.
    """
    problems = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} is {tuple(given[name])}, needs {tuple(shape)}"
            for name, shape in expected.items()
            if name in given and tuple(given[name]) != tuple(shape)
        ],
    }
    found = [f"{len(names)} {problem}: {few(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"{what} does not fit {to}; of its tensors are {'; '.join(found)}.{advice}")

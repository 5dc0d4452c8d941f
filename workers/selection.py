"""Which of a model's parameters a list of names selects. Torch-free; knows no model."""

import difflib
from collections.abc import Iterable, Sequence

from workers.errors import UnknownParameter


def select(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The parameters among `names` that `wanted` names, in the order of `names`.

    An entry names a parameter, or a module and so every parameter below it, by whole dotted
    components: `model.layers.2` never selects `model.layers.20`. Raises `UnknownParameter` for an
    entry that names none.
    """
    known = list(names)
    chosen: set[str] = set()
    for entry in wanted:
        found = [name for name in known if name == entry or name.startswith(f"{entry}.")]
        if not found:
            raise UnknownParameter(
                f"hparams.parameters: the model has no {entry!r}; "
                f"close to it: {_close(entry, known)}; {_there(entry, known)}"
            )
        chosen.update(found)
    return [name for name in known if name in chosen]


def _close(entry: str, known: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(entry, known, n=3, cutoff=0.0))


def _there(entry: str, known: Sequence[str]) -> str:
    """What the model does have where `entry` leaves what there is."""
    parts = entry.split(".")
    for length in reversed(range(len(parts))):
        stem = "".join(f"{part}." for part in parts[:length])
        below = [name[len(stem) :].split(".")[0] for name in known if name.startswith(stem)]
        if below:
            break
    return f"{stem.rstrip('.') or 'the model'} has {', '.join(dict.fromkeys(below))}"

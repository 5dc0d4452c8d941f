"""Keeps what no process here uses out of those that import transformers."""

import sys


def leave_out_unused() -> None:
    """Before transformers is imported; for processes that are ours alone.

    Where scikit-learn and SciPy are installed (lm-evaluation-harness brings them) transformers
    imports them with every model, for tasks of other kinds: 2 of a replica's 13 s of CPU.
    """
    for name in ("scipy", "sklearn"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]

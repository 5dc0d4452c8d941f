"""A process whose clock is off: `python -m tests.faults.skew SECONDS MODULE ARGUMENTS…`.

What Python is told of the wall clock is shifted, before anything else is imported; the monotonic
clock, which no time server sets, is not.
"""

import datetime
import runpy
import sys
import time
from typing import Any


def shift(seconds: float) -> None:
    """From now on, for all that is imported after."""
    real_time, real_time_ns = time.time, time.time_ns
    time.time = lambda: real_time() + seconds
    time.time_ns = lambda: real_time_ns() + round(seconds * 1e9)
    true = datetime.datetime

    class AnyDatetime(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, true)

    class Shifted(datetime.datetime, metaclass=AnyDatetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return true.now(tz) + datetime.timedelta(seconds=seconds)

    vars(datetime)["datetime"] = Shifted


if __name__ == "__main__":
    shift(float(sys.argv[1]))
    module = sys.argv[2]
    del sys.argv[1:3]
    runpy.run_module(module, run_name="__main__")

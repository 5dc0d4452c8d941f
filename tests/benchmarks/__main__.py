"""Every benchmark, one after the other; half an hour on two cores."""

from tests.benchmarks import (
    demo_quality,
    edit_speed,
    growing,
    queries,
    retention,
    scale,
    zero3,
)

queries.main()
for benchmark in (demo_quality, retention, growing, edit_speed, zero3, scale):
    benchmark.measure().show()

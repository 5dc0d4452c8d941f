"""Every benchmark, one after the other; three quarters of an hour on two cores."""

from tests.benchmarks import (
    demo_quality,
    edit_speed,
    growing,
    queries,
    retention,
    scale,
    staging,
    swap,
    zero3,
)

queries.main()
for benchmark in (demo_quality, retention, growing, edit_speed, zero3, scale, staging, swap):
    benchmark.measure().show()

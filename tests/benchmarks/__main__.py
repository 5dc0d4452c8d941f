"""Every benchmark, one after the other."""

from tests.benchmarks import queries

queries.main()

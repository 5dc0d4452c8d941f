"""Commands of `errata` that need more than a call of the HTTP interface, one module each."""

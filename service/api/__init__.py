"""HTTP: validation, admission, problems. Knows the store and `Inference`, never torch or Ray."""

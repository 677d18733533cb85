"""From activations to a guard: subspaces, directions, gate, and the test that picks the sign.

Everything is fitted in float64 and stored in float32. No torch and no graph in this room: it sees
rows of numbers, and its result is a `GuardSpec`. A method is one file.
"""

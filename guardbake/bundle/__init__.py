"""The output side: resumable stages while a bake runs, and the bundle it leaves.

Numpy and the standard library only; `verify` also reads ONNX graphs.
"""

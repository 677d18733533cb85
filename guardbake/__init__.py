"""guardbake bakes safety guards into vision-language models and their ONNX graphs and engines."""

__version__ = "0.1.0"

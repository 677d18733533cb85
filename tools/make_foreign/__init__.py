"""Make tests/foreign/folders: one tiny decoder as other people's exporters write it.

Each exporter has requirements of its own, so each runs in an environment of its own, with
PYTHONPATH=tools. These versions made what is kept::

    python -m make_foreign checkpoint CKPT           torch 2.13.0, transformers 4.57.6
    python -m make_foreign genai CKPT FOLDERS        onnxruntime-genai 0.18.0
    python -m make_foreign mobius CKPT FOLDERS       mobius-onnx 0.1.0
    python -m make_foreign optimum CKPT FOLDERS      optimum 2.1.0, optimum-onnx 0.1.0
    python -m make_foreign onnxruntime CKPT FOLDERS  onnxruntime 1.31.1, transformers 5.23.0
    python -m make_foreign edgellm CKPT FOLDERS      tensorrt-edgellm 0.11.0
    python -m make_foreign multimodal_checkpoint tests/foreign/qwen2_5_vl    transformers 5.23.0
    python -m make_foreign multimodal tests/foreign/qwen2_5_vl FOLDERS       mobius-onnx 0.1.0

The folders are as the tools wrote them, but for two things: tokenizer files are left out, and so
are the paths and the source lines that torch notes down at each node. What is mended in the last
one stands in `multimodal`.
"""

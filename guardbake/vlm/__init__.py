"""The PyTorch side: load a VLM, find its tokens, capture activations, run the guarded reference."""

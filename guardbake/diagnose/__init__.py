"""Where harmful and harmless come apart: which layers, which boundary."""

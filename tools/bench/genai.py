"""How fast onnxruntime-genai runs a folder, beside another: prefill and each token after it.

    python tools/bench/genai.py FOLDER BASELINE [--rounds 5] [--prompt 128] [--tokens 32]

Both are asked in turn, greedily, with a prompt of the same token ids and no picture; the least of
all rounds counts, and the ratios are of these. Needs onnxruntime-genai, as the tests do. What
mobius 0.1 writes genai 0.18 runs once `tools/make_foreign` has mended its configuration.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

FIRST_ID = 8  # behind the marks of the bench's tokenizer


def ask(model: genai.Model, prompt: int, tokens: int) -> tuple[float, float]:
    """Seconds of prefill, and of a token after it."""
    parameters = genai.GeneratorParams(model)
    longest = prompt + tokens + 1
    parameters.set_search_options(max_length=longest, min_length=longest, do_sample=False)
    generator = genai.Generator(model, parameters)
    ids = (FIRST_ID + np.arange(prompt) % 20).astype(np.int32)
    started = time.perf_counter()
    generator.append_tokens(ids)
    fed = time.perf_counter()
    for _ in range(tokens):
        generator.generate_next_token()
    return fed - started, (time.perf_counter() - fed) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    models = [genai.Model(str(path)) for path in (arguments.folder, arguments.baseline)]
    seen = [
        [ask(model, arguments.prompt, arguments.tokens) for model in models]
        for _ in range(arguments.rounds)
    ]
    folder, baseline = np.array(seen).min(axis=0)
    for what, mine, other in zip(("prefill", "a token"), folder, baseline, strict=True):
        print(f"{what}: {1e3 * mine:.1f} ms, baseline {1e3 * other:.1f} ms, {mine / other:.3f} x")


if __name__ == "__main__":
    main()

"""Do two renderings of the law agree, and what may be claimed of it."""

"""Train the two toy vision-language models that drive the tests; the command is in __main__.py."""

#!/usr/bin/env bash
# Install a wheel without PyTorch into an environment of its own and use it outside the checkout.
set -euo pipefail
wheel=$(realpath "$1")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check --quiet install -c "$constraints" "$wheel[onnx]"
venv/bin/guardbake --version
venv/bin/python - <<'PY'
import importlib.util
import sys
from importlib.metadata import entry_points

from guardbake.plugins import find_exporter, find_runner
from guardbake.vlm.catalog import families, models_root

assert importlib.util.find_spec("torch") is None, "this environment is meant to have no PyTorch"
assert [family.name for family in families()] == ["llava", "qwen2_5_vl"], families()
assert (models_root() / "demo.toml").is_file(), models_root()
assert "site-packages" in str(models_root()), models_root()
assert find_runner("onnx") is not None and find_exporter("onnx").name == "onnx"
assert {p.name for p in entry_points(group="guardbake.engines")} == {"rtx", "tensorrt"}
assert not {"exporters", "models", "tools", "tests"} & set(sys.modules)
print("wheel: families, entry points and model data found without PyTorch")
PY
status=0
venv/bin/guardbake doctor >doctor.txt 2>&1 || status=$?
test "$status" -eq 7 || { cat doctor.txt; echo "doctor without PyTorch: exit $status, expected 7"; exit 1; }
status=0
venv/bin/guardbake verify nowhere 2>verify.txt || status=$?
test "$status" -eq 2 || { cat verify.txt; echo "verify of nothing: exit $status, expected 2"; exit 1; }
echo "wheel: passed"

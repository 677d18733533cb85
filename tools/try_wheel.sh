#!/usr/bin/env bash
# Install a wheel without PyTorch into an environment of its own and use it outside the checkout.
set -euo pipefail
wheel=$(realpath "$1")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
families=$(cd "$(dirname "$0")/../models" && grep -l '^\[family\]' -- *.toml)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check --quiet install -c "$constraints" "$wheel[onnx,sign]"
venv/bin/guardbake --version
venv/bin/python - $families <<'PY'
import importlib.util
import sys
from importlib.metadata import entry_points

from guardbake.plugins import find_exporter, find_runner
from guardbake.vlm.catalog import families, models_root

assert importlib.util.find_spec("torch") is None, "this environment is meant to have no PyTorch"
assert [f"{family.name}.toml" for family in families()] == sorted(sys.argv[1:]), families()
assert (models_root() / "demo.toml").is_file(), models_root()
assert "site-packages" in str(models_root()), models_root()
assert find_exporter("onnx").name == "onnx"
assert all(find_runner(name) is not None for name in ("onnx", "cuda", "rtx", "tensorrt"))
assert {p.name for p in entry_points(group="guardbake.engines")} == {"rtx", "tensorrt"}
assert not {"exporters", "models", "tools", "tests"} & set(sys.modules)
print("wheel: families, entry points and model data found without PyTorch")
PY
mkdir -p signed/processor
echo weights >signed/decoder.onnx.data
echo words >signed/processor/vocab.json
venv/bin/python - <<'PY'
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from guardbake.bundle.signing import check_signature, sign
from guardbake.errors import GuardbakeError, IntegrityError, UsageError

PEM = serialization.Encoding.PEM
for name in ("ours", "theirs"):
    key = ec.generate_private_key(ec.SECP256R1())
    private = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Path(f"{name}.pem").write_bytes(key.private_bytes(PEM, *private))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    Path(f"{name}.pub").write_bytes(key.public_key().public_bytes(PEM, public))
bundle, signature, key = Path("signed"), Path("signed.sig"), Path("ours.pub")
sign(bundle, Path("ours.pem"), signature)
check_signature(bundle, key, signature)


def refused(kind: type[GuardbakeError], public_key: Path = key) -> None:
    try:
        check_signature(bundle, public_key, signature)
    except kind:
        return
    raise AssertionError("a signature that is not ours over these files was accepted")


refused(IntegrityError, Path("theirs.pub"))
refused(UsageError, Path("ours.pem"))
extra = bundle / "extra"
extra.touch()
refused(IntegrityError)
extra.unlink()
(bundle / "decoder.onnx.data").write_text("weightz\n")
refused(IntegrityError)
(bundle / "decoder.onnx.data").write_text("weights\n")
check_signature(bundle, key, signature)
text = signature.read_text()
signature.write_text(text[: len(text) // 2])
refused(IntegrityError)
print("wheel: a bundle is signed, and four ways to harm it or its signature are refused")
PY
status=0
venv/bin/guardbake doctor >doctor.txt 2>&1 || status=$?
test "$status" -eq 7 || { cat doctor.txt; echo "doctor without PyTorch: exit $status, expected 7"; exit 1; }
status=0
venv/bin/guardbake verify nowhere 2>verify.txt || status=$?
test "$status" -eq 2 || { cat verify.txt; echo "verify of nothing: exit $status, expected 2"; exit 1; }
echo "wheel: passed"

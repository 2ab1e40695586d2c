#!/usr/bin/env bash
# Opt-in: runs transformers' own ModelTesterMixin on our classes. `bash tests/peers.sh`, in an environment with cinetok.
# The mixin comes with transformers' source distribution (fetched by pip into a temporary folder, nothing is kept), which
# lacks two small modules; tests/peers/ holds our stand-ins for them and the adapters, with every skip explained.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
version=$(python -c 'import transformers; print(transformers.__version__)')
python -m pip install --quiet parameterized
python -m pip download --quiet --no-deps --no-build-isolation --no-binary transformers -d "$work" "transformers==$version"
tar -xzf "$work/transformers-$version.tar.gz" -C "$work" --wildcards '*/tests/*.py'
cd "$work/transformers-$version"
mkdir -p tests/exporters tests/generation tests/cinetok_models
touch tests/__init__.py tests/{exporters,generation,cinetok_models}/__init__.py
cp "$here/peers/stub_export.py" tests/exporters/test_export.py
cp "$here/peers/stub_generation.py" tests/generation/test_utils.py
for adapter in "$here"/peers/*_models.py; do
    cp "$adapter" "tests/cinetok_models/test_$(basename "$adapter")"
done
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 python -m pytest -q -p no:cacheprovider -W ignore tests/cinetok_models "$@"

#!/usr/bin/env bash
# Everything that a GPU must prove, in at most eight minutes: one table, and gpu-proof/gpu.json. docs/gpu.md says what each line is.
#
#     benchmarks/gpu.sh                       # on a machine with an NVIDIA GPU
#     benchmarks/gpu.sh --double              # on any machine: small shapes, a double in place of the GPU
#     WHEELS=folder benchmarks/gpu.sh         # without a network: packages that are missing are taken from the folder
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
paths="$here/src:$here/tests:$here/benchmarks"
if [ -n "${WHEELS:-}" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$packages" "$WHEELS"/*.whl
    paths="$paths:$packages"
fi
# A checkout that is not installed has no version, which every run notes down.
if ! PYTHONPATH="$paths" "$python" -c 'import importlib.metadata as m; m.version("opdgeo")' 2>/dev/null; then
    about=$(mktemp -d)
    trap 'rm -rf "$about" "${packages:-$about}"' EXIT
    mkdir "$about/opdgeo-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: opdgeo\nVersion: 0\n' > "$about/opdgeo-0.dist-info/METADATA"
    paths="$paths:$about"
fi
# No library of the machine is shadowed: what it has comes from it. One BLAS thread a process, as the package itself asks for.
export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTORCH_NVML_BASED_CUDA_CHECK=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$python" "$here/benchmarks/gpu.py" "$@"

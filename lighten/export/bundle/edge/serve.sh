#!/bin/sh
# Serves the model through the OpenAI-compatible server of llama-cpp-python, to this machine only.
# HOST and PORT say where; arguments go to the server.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
needs="llama_cpp.server.app, uvicorn"
requirements=requirements-server.txt
. "$here/python.sh"
PYTHONSAFEPATH=1 # nothing is imported from the directory that this is called in
export PYTHONSAFEPATH
unset CONFIG_FILE # the server would take it for its own, and leave the arguments below aside
threads=$("$python" -B -c 'import sys; sys.path.insert(0, sys.argv[1]); import bench; print(bench.cores())' "$here")
HOST=${HOST:-127.0.0.1} PORT=${PORT:-8080}
export HOST PORT # an empty one in the environment would mean every address
exec "$python" -m llama_cpp.server --model "$here/@FILE@" --model_alias "@NAME@" --n_ctx @CONTEXT@ --n_gpu_layers @GPU_LAYERS@ \
    --n_threads "$threads" --n_threads_batch "$threads" --flash_attn true --host "$HOST" --port "$PORT" "$@"

#!/bin/sh
# Serves the model through the OpenAI-compatible server of llama-cpp-python, to this machine only.
# HOST and PORT say where; arguments go to the server.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
needs="llama_cpp.server.app, uvicorn"
requirements=requirements-server.txt
. "$here/python.sh"
exec "$python" -m llama_cpp.server --model "$here/@FILE@" --model_alias "@NAME@" --n_ctx @CONTEXT@ --n_gpu_layers @GPU_LAYERS@ \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8080}" "$@"

#!/bin/sh
# Chats with the model: a line is a message. Arguments go to chat.py.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
needs=llama_cpp
requirements=requirements.txt
. "$here/python.sh"
exec "$python" -B "$here/chat.py" "$@"

# Sets `python` to an interpreter that can do `import $needs`. Sourced by the scripts beside it, which set `here`,
# `needs` and `requirements`. PYTHON names the interpreter to try first; without one that has what is needed, an
# environment is made in venv/ and filled from the pinned requirements, by whatever pip is configured to use.
has() {
    "$1" -c "import $needs" >/dev/null 2>&1
}
python=${PYTHON:-python3}
if ! has "$python"; then
    if ! command -v "$python" >/dev/null 2>&1; then
        echo "there is no $python here: install Python 3.10 or later with venv (Debian: apt install python3-venv)" >&2
        exit 127
    fi
    own=$here/venv/bin/python
    if ! has "$own"; then
        echo "$python has no llama-cpp-python: installing it in $here/venv (it is compiled: some minutes)" >&2
        [ -x "$own" ] || "$python" -m venv "$here/venv" >&2
        "$own" -m pip install -r "$here/$requirements" >&2
    fi
    python=$own
fi

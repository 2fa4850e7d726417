# Sets `python` to an interpreter that can do `import $needs`. Sourced by the scripts beside it, which set `here`,
# `needs` and `requirements`. PYTHON names the interpreter to try first; without one that has what is needed, an
# environment is made in venv/ and filled from the pinned requirements, by whatever pip is configured to use.
# PYTHONSAFEPATH: nothing is imported from the directory that a script is called in.
has() {
    PYTHONSAFEPATH=1 "$1" -c "import $needs" >/dev/null 2>&1
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
        PYTHONSAFEPATH=1 "$own" -c "import pip" >/dev/null 2>&1 ||
            PYTHONSAFEPATH=1 "$python" -m venv "$here/venv" >&2 || {
            echo "$python cannot make $here/venv: install venv (Debian: apt install python3-venv)" >&2
            exit 1
        }
        PYTHONSAFEPATH=1 PIP_DISABLE_PIP_VERSION_CHECK=1 "$own" -m pip install -r "$here/$requirements" >&2 || {
            echo "pip cannot install $requirements: it takes a C++ compiler (Debian: apt install build-essential)," \
                "a package index, and for the server Python 3.11 or later" >&2
            exit 1
        }
    fi
    python=$own
fi

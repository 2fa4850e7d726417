"""`python -m lighten` and `lighten` are the same command."""

import os
import sys


def main() -> None:
    """Runs the command with nothing imported from the working directory, where a model of somebody else's may lie.

    `python -m` puts that directory first, and so does a colon too many in PYTHONPATH.
    """
    if __name__ == "__main__" and not sys.flags.safe_path:
        del sys.path[0]
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if len(entries) > 1 and "" in entries:
        here, meant = os.path.abspath(""), [os.path.abspath(entry) for entry in entries if entry]
        sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here or here in meant]
    from lighten.cli.main import main as command

    command()


if __name__ == "__main__":
    main()

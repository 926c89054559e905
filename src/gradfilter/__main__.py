"""The command line: ``gradfilter`` and ``python -m gradfilter`` are the same."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of the lab, or name the missing extra.

    Help and version need no extra.
    """
    from gradfilter._about import answer

    text = answer(sys.argv[1:])
    if text is not None:
        print(text, end="")
        return
    try:
        from gradfilter.lab._cli import main as lab_main

        lab_main()  # commands import their requirements when they run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gradfilter"):
            raise
        package = error.name.split(".")[0]
        print(
            f"gradfilter: the command line needs {package!r}, which is not installed. "
            'Install the extra: pip install "gradfilter[lab]"',
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()

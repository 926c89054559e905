"""Run experiments and the command line; needs the extra ``lab``."""

import importlib.util

# Checked here, which costs nothing, and not when the part that needs it is loaded.
for _name in ("filelock", "matplotlib", "numpy", "rich", "sklearn", "tyro"):
    if importlib.util.find_spec(_name) is None:
        raise ModuleNotFoundError(f"No module named {_name!r}", name=_name)

"""Makes TOAST known to PEFT in programs that never import `toast`.

`toast-steering.pth` imports this when Python starts, in every process of the environment. So it imports
nothing itself, and whatever fails later leaves PEFT's import as it would be without it.
"""

import sys


class WaitForPeft:
    """Import hook that finds nothing itself; it calls for `toast` when PEFT is about to be imported."""

    def __init__(self):
        self.done = False

    def find_spec(self, fullname, path=None, target=None):
        """Hands PEFT to the hook of `toast.registration`, and says nothing about all else."""
        if fullname != "peft" or self.done:
            return None
        self.done = True
        try:
            return find_by_toast(fullname, path, target)
        except Exception:
            return None


def find_by_toast(*asked):
    """Finds PEFT by the hook of `toast`, unless the program has a `toast` of its own in front of ours."""
    from importlib.util import find_spec
    from pathlib import Path

    if not Path(find_spec("toast").submodule_search_locations[0], "registration.py").is_file():
        return None
    from toast import registration

    return registration.install().find_spec(*asked)


sys.meta_path.insert(0, WaitForPeft())

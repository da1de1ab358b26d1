"""Stage one on any number of processes.

accelerate launch scripts/pretune.py --config CONFIG [KEY=VALUE]...
"""

from toast.commands.processes import script
from toast.commands.train import pretune

if __name__ == "__main__":
    script(pretune)

"""Stage one on any number of processes.

accelerate launch scripts/pretune.py --config CONFIG [KEY=VALUE]...
"""

from toast.commands.training import pretune, script

if __name__ == "__main__":
    script(pretune)

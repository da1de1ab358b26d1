"""Stage two on any number of processes.

accelerate launch scripts/tune.py --config CONFIG [KEY=VALUE]...
"""

from toast.commands.training import script, tune

if __name__ == "__main__":
    script(tune)

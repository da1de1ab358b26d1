"""Stage two on any number of processes.

accelerate launch scripts/tune.py --config CONFIG [KEY=VALUE]...
"""

from toast.commands.processes import script
from toast.commands.train import tune

if __name__ == "__main__":
    script(tune)

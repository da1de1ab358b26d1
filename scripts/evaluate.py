"""Measures a run on processes: `accelerate launch scripts/evaluate.py --config RUN [KEY=VALUE]...`."""

from toast.commands.evaluate import evaluate
from toast.commands.processes import script

if __name__ == "__main__":
    script(evaluate)

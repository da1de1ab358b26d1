"""Measures a run on processes: `accelerate launch scripts/evaluate.py --config RUN [KEY=VALUE]...`."""

from toast.commands.training import evaluate, script

if __name__ == "__main__":
    script(evaluate)

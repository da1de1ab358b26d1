"""Stage one on one or several processes: `accelerate launch scripts/pretune.py --config CONFIG [KEY=VALUE]...`."""

from toast.commands.training import pretune, script

if __name__ == "__main__":
    script(pretune)

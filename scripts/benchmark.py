"""What TOAST costs beside the plain model, LoRA and others: the command `toast benchmark` from a checkout.

python scripts/benchmark.py --out toast-benchmark [--only step-16] [--rounds 5] [--threads 2] [--small]
"""

import sys

from toast.cli import app

if __name__ == "__main__":
    app(["benchmark", *sys.argv[1:]])

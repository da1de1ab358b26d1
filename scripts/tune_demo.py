#!/usr/bin/env python3
"""Tries learning rates for the methods of `toast demo`, whose held-out pictures stay unseen.

    python scripts/tune_demo.py toast --rates 3e-4 1e-3 3e-3

Every method is trained on 1,000 pictures of the training split and evaluated on 400 others of it. TOAST and
TOAST-Lite stand on one pre-tuning, which is made first if --pretrained has none.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from accelerate.utils import set_seed

from toast.demo import measures
from toast.demo.methods import METHODS, RECIPES, SELECT_FROM, pre_tune
from toast.demo.task import Pictures, load_generic, load_task


def rows(pictures: Pictures, chosen: slice) -> Pictures:
    """Returns some of the pictures."""
    return Pictures(pictures.images[chosen], pictures.labels[chosen], pictures.boxes[chosen])


def main() -> None:
    """Trains with every rate and prints a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=[*METHODS, "pre-tuning"])
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--pretrained", type=Path, default=Path("toast-tuning/pretrained"))
    parser.add_argument("--generic", type=int, default=1000, help="pictures of the pre-tuning")
    parser.add_argument("--select-from", type=int, default=SELECT_FROM, help="block of the pre-tuning")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pictures, _ = load_task(train=1400, test=10, seed=args.seed)
    train, validation = rows(pictures, slice(0, 1000)), rows(pictures, slice(1000, 1400))
    for rate in args.rates:
        recipe = replace(RECIPES[args.method], learning_rate=rate)
        recipe = replace(recipe, epochs=args.epochs or recipe.epochs)
        set_seed(args.seed)
        if args.method == "pre-tuning" or not args.pretrained.is_dir():
            stage_one = recipe if args.method == "pre-tuning" else RECIPES["pre-tuning"]
            generic = load_generic(args.generic, args.seed)
            pre_tune(generic, args.pretrained, stage_one, select_from=args.select_from)
            set_seed(args.seed)
        method = "toast" if args.method == "pre-tuning" else args.method
        recipe = RECIPES["toast"] if args.method == "pre-tuning" else recipe
        trained = METHODS[method](train, args.pretrained, recipe, args.seed)
        accuracy, on_target = measures.evaluate(trained.model, validation)
        print(
            f"{args.method}  rate {rate:g}  epochs {recipe.epochs}  accuracy {accuracy:.3f}  "
            f"attention on target {on_target:.3f}  {trained.seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

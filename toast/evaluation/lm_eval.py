"""Tasks of lm-eval (EleutherAI's evaluation harness) on a model as it is, adapters included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toast.visual.modes import evaluating

#: Draws behind the standard errors of measures that are no mean.
BOOTSTRAPS = 1000


def evaluate_with_lm_eval(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    few_shot: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Runs tasks of lm-eval through its own `HFLM`.

    Args:
        model: A causal language model of transformers, or one that PEFT wrapped.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups, as `lm-eval ls tasks` lists them.
        include_path: Folder with further tasks, a YAML file each.
        limit: Only so many documents of each task.
        batch_size: Sequences at a time.
        few_shot: Examples before each question; None is what the task says.
        seed: Of the choice of examples and of what is drawn.

    Returns:
        Task -> measure -> value, with `_stderr` of those that have one. Of measures without a filter the name
        is plain (`acc`), of others the filter follows (`exact_match,strict-match`).

    Raises:
        ImportError: If lm-eval is not installed.
        ValueError: If a task is not there.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("tasks of lm-eval need it: pip install 'toast-steering[lm-eval]'") from error
    own = None if include_path is None else str(include_path)
    manager = None if own is None else TaskManager(include_path=own, include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=own)  # reads all of lm-eval's files, which takes many seconds
    known = manager.all_tasks
    lacking = [task for task in tasks if task not in known]
    if lacking or not tasks:
        raise ValueError(
            f"tasks: needs names of lm-eval's {len(known)} tasks, or of those in include_path "
            f"({include_path}); got {', '.join(lacking) or 'none'}."
        )
    with evaluating(model):
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=few_shot,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in measures.items()
            if isinstance(value, (int, float))
        }
        for task, measures in found["results"].items()
    }

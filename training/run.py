"""Trains AlexNet on a shard set and registers the result; `--help` lists every field.

Runs as a script from any folder and as a Ray job:

    python training/run.py [RECIPE] [flags]
    ray job submit --working-dir . -- python training/run.py [RECIPE] [flags]

Holds nothing that a worker needs: here it is `__main__`, which workers cannot import.
"""

import json
import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder comes first on its path: with the checkout in its place, the packages
    # are found from any folder, and no file beside this one can shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines import command

    command.begin()

from pipelines import command
from training.command_line import parse
from training.config import to_dict

logger = logging.getLogger("training")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 trained, 1 training failed, 2 wrong usage or input, 130 interrupted."""
    logging.basicConfig(format="%(message)s")  # warnings of the libraries
    logger.setLevel(logging.INFO)
    return command.answered(
        lambda: _asked(sys.argv[1:] if argv is None else argv),
        stopped="interrupted before the training began",
    )


def _asked(argv: list[str]) -> int:
    asked = parse(argv)
    if asked.action == "print":
        print(json.dumps(to_dict(asked.config), indent=1))
        return 0
    if asked.action == "train":
        logger.info("loading PyTorch, MLflow and Ray")
    with command.importing():
        from training import driver  # with Ray, torch and MLflow: seconds

    if asked.action == "train":
        return driver.train(asked.config)
    print(driver.dry_run(asked.config))
    return 0


if __name__ == "__main__":
    command.leave(main)

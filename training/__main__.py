"""Commands about trained networks; each says more with --help.

python -m training evaluate MODEL --data OUT      accuracy, by class, with its errors
python -m training predict IMAGE|FOLDER…          names the classes of images
python -m training figures MODEL --data OUT       conv1's kernels, likeliest classes of images
python -m training export MODEL                   as ONNX or torch.export, for other programs
python -m training runs list|rm                   what runs left on disk
python -m training registry list|show|promote|…   versions, and the gate before the champion
"""

import importlib
import sys
from collections.abc import Sequence

from alexnet.errors import UserError
from pipelines import command

# Imported when it is asked for: each takes seconds.
COMMANDS = {
    "evaluate": "training.evaluate",
    "predict": "training.predict",
    "figures": "training.figures",
    "export": "training.export",
    "runs": "training.runs",
    "registry": "training.registry.__main__",
}


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(words: list[str]) -> int:
    name, *rest = words or [""]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"{name!r} is not a command; choose one of {', '.join(COMMANDS)}, or see "
            "`python -m training --help`"
        )
    with command.importing():
        program = importlib.import_module(COMMANDS[name])
    code: int = program.main(rest)
    return code


if __name__ == "__main__":
    command.begin()
    command.leave(main)

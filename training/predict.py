"""Names the classes of picture files with a registered model.

    python -m training.predict IMAGE… [--model models:/alexnet@champion] [--top 5]

The geometry and the pixel statistics are the model's own: it carries them from its shards.
"""

import argparse
import sys

import torch

from alexnet.errors import UserError
from alexnet.predict import decode, top_k
from alexnet.preprocess import resize_and_crop
from training import tracking
from training.registry.versions import load


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for wrong usage, a missing model or a file that is not a picture."""
    parser = argparse.ArgumentParser("python -m training.predict", description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG, … files")
    parser.add_argument("--model", default="models:/alexnet@champion", help="an MLflow model URI")
    parser.add_argument("--top", type=int, default=5, help="how many classes to name")
    args = parser.parse_args(argv)
    try:
        if args.top < 1:
            raise UserError(f"--top {args.top} is below 1; pass 1 or more")
        pictures = [decode(path) for path in args.images]
        tracking.connect(tracking.tracking_uri())
        model = load(args.model)
        spec = model.input_spec
        images = torch.stack([resize_and_crop(p, spec.resize, spec.crop) for p in pictures])
        found = top_k(model.network, images, spec, model.class_names, args.top)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, classes in zip(args.images, found, strict=True):
        print(path)
        for name, probability in classes:
            print(f"  {probability:7.2%}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

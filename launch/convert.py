"""Weights in: launch/convert.py import --format hf --from FOLDER --to OUT
               launch/convert.py upcycle --from CHECKPOINT --to OUT --experts N [model.ffn.router.KEY=VALUE ...]

import: a Hugging Face folder (Llama family) becomes a checkpoint. upcycle: the experts of every layer become copies of
a dense checkpoint's FFN, or, of a model with one expert a modality (1t1i), of that modality's. OUT/model.yaml is the
recipe's `model:` section that fits; a run starts from it by init_from.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from moe_dist.convert.hugging_face import import_folder
from moe_dist.convert.upcycle import Gates, upcycle
from moe_dist.parallel.launch import run_rank


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    importing, upcycling = jobs.add_parser("import"), jobs.add_parser("upcycle")
    for job in (importing, upcycling):
        job.add_argument("--from", dest="source", type=Path, required=True, metavar="FOLDER")
        job.add_argument("--to", dest="out", type=Path, required=True, metavar="OUT", help="a new folder")
    importing.add_argument("--format", choices=["hf"], required=True, help="hf: Hugging Face, safetensors")
    upcycling.add_argument("--experts", required=True, help="of each layer: 8, or of each modality: 4t4i")
    upcycling.add_argument("--gates", choices=get_args(Gates), default="fresh", help="of a 1t1i model: %(default)s")
    upcycling.add_argument("--seed", type=int, default=0, help="of the gates: %(default)s")
    upcycling.add_argument("overrides", nargs="*", metavar="model.ffn.router.KEY=VALUE")
    arguments = parser.parse_args(argv)
    if arguments.job == "import":
        import_folder(arguments.source, arguments.out)
    else:
        upcycle(
            arguments.source, arguments.out, experts=arguments.experts, gates=arguments.gates,
            overrides=arguments.overrides, seed=arguments.seed,
        )  # fmt: skip
    print(f"{arguments.out}: checkpoint and model.yaml")


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))

"""Import, export, upcycle and verify checkpoints:

    launch/convert.py import --from FOLDER --to OUT       convert a Hugging Face folder (Llama, Mixtral) to a checkpoint
    launch/convert.py model --from FOLDER --to FILE.yaml  write only the `model:` section of a Hugging Face folder
    launch/convert.py export --from CHECKPOINT --to OUT   convert a checkpoint to a Hugging Face folder; LoRA is merged
    launch/convert.py export --adapters --from CHECKPOINT --to OUT   write only the LoRA deltas, as a PEFT adapter
    launch/convert.py upcycle --from CHECKPOINT --to OUT --experts N [model.ffn.router.KEY=VALUE ...]
    launch/convert.py verify FOLDER                       check every byte of a checkpoint, or of a run's checkpoints

If CHECKPOINT is a run folder, the run's newest checkpoint is used.
import, upcycle: the file OUT/model.yaml is written, too. It is the matching `model:` section for a recipe. To start a
run from the new checkpoint, set the recipe's key init_from.
model: a run can start from a Hugging Face folder without import. Its recipe then needs `init_from: FOLDER` and the
section that this command writes. The recipe can include the section with `extends: FILE.yaml`.
upcycle: makes a sparse model from a dense checkpoint. The experts of each layer are copies of the layer's FFN. If the
checkpoint has one expert per modality (1t1i), the experts of a modality are copies of that modality's expert.
verify: the files are checked without building the model.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from moe_dist.convert.adapters import export_adapters
from moe_dist.convert.hugging_face import export_folder, import_folder, write_section
from moe_dist.convert.inspection import inspect
from moe_dist.convert.upcycle import Gates, upcycle
from moe_dist.parallel.discovery import run_rank


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.job == "verify":
        inspect(arguments.folder, print)
    elif arguments.job == "import":
        for dropped in import_folder(arguments.source, arguments.out):
            print(f"not used: {dropped}")
        print(f"{arguments.out}: checkpoint and model.yaml")
    elif arguments.job == "model":
        write_section(arguments.source, arguments.out)
        print(f"{arguments.out}: the `model:` section")
    elif arguments.job == "export" and arguments.adapters:
        print(f"{arguments.out}: {export_adapters(arguments.source, arguments.out)}")
    elif arguments.job == "export":
        export_folder(arguments.source, arguments.out, dtype=arguments.dtype)
        print(f"{arguments.out}: Hugging Face folder")
    else:
        upcycle(
            arguments.source,
            arguments.out,
            experts=arguments.experts,
            gates=arguments.gates,
            overrides=arguments.overrides,
            seed=arguments.seed,
        )
        print(f"{arguments.out}: checkpoint and model.yaml")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    importing, describing, exporting, upcycling = map(jobs.add_parser, ("import", "model", "export", "upcycle"))
    for job in (importing, describing, exporting, upcycling):
        job.add_argument("--from", dest="source", type=Path, required=True, metavar="FOLDER")
        job.add_argument(
            "--to", dest="out", type=Path, required=True, metavar="OUT", help="a folder (model: a file) to create"
        )
    for job in (importing, exporting):
        job.add_argument("--format", choices=["hf"], default="hf", help="hf: Hugging Face folder (safetensors)")
    exporting.add_argument("--adapters", action="store_true", help="write only the LoRA deltas, as a PEFT adapter")
    exporting.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    upcycling.add_argument(
        "--experts", required=True, help="experts per layer, such as 8, or per modality, such as 4t4i"
    )
    upcycling.add_argument(
        "--gates",
        choices=get_args(Gates),
        default="fresh",
        help="gates for a 1t1i model's experts (default: %(default)s)",
    )
    upcycling.add_argument("--seed", type=int, default=0, help="seed of fresh gates (default: %(default)s)")
    upcycling.add_argument("overrides", nargs="*", metavar="model.ffn.router.KEY=VALUE")
    jobs.add_parser("verify").add_argument("folder", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))

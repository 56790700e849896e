"""An adapter and its base as one model: the verb that writes them merged.

python -m gpt.lora merge runs/tuned models/tuned

The adapter alone is the run's checkpoint, in PEFT's form; the merged model is a plain directory that loads everywhere.
"""

import argparse
from pathlib import Path

from gpt import signals


def arguments(argv: list[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m gpt.lora", description=__doc__, formatter_class=kind, allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="merge")
    merge = verbs.add_parser("merge", help="write base and adapter as one plain model, fp32", allow_abbrev=False)
    merge.add_argument("run", metavar="RUN", help="a run with an adapter, RUN@STEP|best|last, or a checkpoint of it")
    merge.add_argument("out", metavar="OUT", type=Path, help="the model's directory, new; whole or not at all")
    merge.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    with signals.loading():
        from rich.console import Console

        from gpt import lora, run

    path, described = run.resolve(args.run)
    lora.merge(path, args.out)
    console = Console()
    for line in (f"{described} merged with its base: {args.out}", f'next: python sample.py {args.out} --prompt "..."'):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    signals.run(main)  # does not return: --help answers before the rest of this file, which loads torch, is read

from gpt import checkpoint, durable, hf  # noqa: E402
from gpt.run import ADAPTER  # noqa: E402


def merge(path: Path, out: Path) -> None:
    """Write the adapter in `path`, merged with its base, as the model directory `out`: fp32, whole or not at all.

    ValueError if `path` is no adapter, FileExistsError if `out` exists; the base and the adapter are only read.
    """
    if not (path / ADAPTER).exists():
        raise ValueError(f"{path} is no adapter but a whole model already; there is nothing to merge")
    if out.exists():
        raise FileExistsError(f"{out} exists already; name a directory that does not")
    model, tokenizer = hf.load(path)
    weights = hf.to_disk(model.config, model.state_dict())
    durable.make_directory(out.absolute().parent)
    with durable.Directory(out) as directory:
        for name, data in hf.model_files(model.config, tokenizer).items():
            directory.write(name, data)
        directory.write(checkpoint.WEIGHTS, checkpoint.serialize(weights, {"format": "pt"}))

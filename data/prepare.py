"""Prepare text for training: a tokenizer and token shards in one directory.

    python data/prepare.py INPUT... --out data/NAME      INPUT: file, directory, glob, '-', URL (with #sha256=...), hub:ORG/NAME
    python data/prepare.py data/NAME.yaml [key=value ...]

A data set that is up to date is left alone; an interrupted preparation continues where it stopped. On several machines
that share a disk: the same command with --scan once, with --part 1/N .. N/N anywhere, with --merge once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt import signals  # isort: skip  (before what takes long to import: a stop request must not be lost)

import argparse
import json
import re


def unescaped(text: str) -> str:
    r"""A text of the command line, in which \n and \t are written out: a shell leaves them as they are."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data/prepare.py",
        description="Prepare text for training: a tokenizer and token shards in one directory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "input", nargs="*", metavar="INPUT | RECIPE.yaml [key=value]", help="what to read, or a recipe and its changes"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the data set to make, for example data/mine")
    parser.add_argument("--field", metavar="KEY", help="the field or column that holds the text; text by default")
    parser.add_argument(
        "--template", metavar="TEXT", type=unescaped, help="the text made of several fields: '{title}\\n{body}'"
    )
    spoken = parser.add_mutually_exclusive_group()
    spoken.add_argument(
        "--chat", action="store_true", help="records are conversations; the assistant's turns are learned"
    )
    spoken.add_argument("--preference", action="store_true", help="records are pairs: chosen and rejected answers")
    parser.add_argument(
        "--separator", metavar="TEXT", type=unescaped, help="what parts the documents of a file; else each is one"
    )
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--vocab-size", metavar="N", help="entries of the tokenizer to train; follows the corpus by default"
    )
    vocabulary.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="use this vocabulary file, or that of a data set, run or model (hub:ORG/NAME)",
    )
    growth = parser.add_mutually_exclusive_group()
    growth.add_argument("--grow", metavar="N", help="learn N more tokens beside those of --tokenizer, on this text")
    growth.add_argument("--add-tokens", metavar="FILE", help="add the tokens of a file, one a line, to --tokenizer")
    parser.add_argument(
        "--val-fraction", type=float, metavar="F", help="part of the bytes held out for validation; 0.1 by default"
    )
    parser.add_argument("--duplicates", choices=["keep", "drop"], help="documents with the text of an earlier one")
    parser.add_argument("--on-bad-record", choices=["error", "skip"], help="what to do with text that cannot be read")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; all cores by default")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set made from other text or settings")
    step = parser.add_mutually_exclusive_group()
    step.add_argument(
        "--scan", action="store_true", help="only the pass over the whole text, before --part and --merge"
    )
    step.add_argument("--part", metavar="I/N", help="only every N-th chunk of a scanned text, from the I-th on")
    step.add_argument("--merge", action="store_true", help="make the data set of a scanned text whose parts are done")
    parser.add_argument(
        "--keys", action="store_true", help="print the settings of a recipe with type, default and meaning"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    with signals.loading():
        from rich.console import Console
        from rich.table import Table

        from gpt import config, prepare
        from gpt.recipe import PrepareConfig, as_source

    console = Console()
    if args.keys:
        table = Table("setting", "type", "default", "meaning", box=None)
        for row in config.describe(PrepareConfig):
            table.add_row(*map(str, row))
        console.print(table)
        return
    if not args.input:
        raise ValueError(
            "name what to read: python data/prepare.py INPUT... --out data/NAME, or a recipe: data/quickstart.yaml"
        )
    named = ("vocab_size", "tokenizer", "grow", "add_tokens", "val_fraction", "duplicates", "on_bad_record", "workers")
    changes = [
        f"{name}={json.dumps(text, ensure_ascii=False)}" for name in named if (text := getattr(args, name)) is not None
    ]
    ways = ("field", "template", "separator", "chat", "preference")
    options = {name: value for name in ways if (value := getattr(args, name)) not in (None, False)}
    if args.input[0].endswith((".yaml", ".yml")):
        if options:
            raise ValueError(f"--{next(iter(options))} belongs into the recipe, beside the path of the input it is for")
        recipe = Path(args.input[0])
        settings = prepare.load_recipe(recipe, [*args.input[1:], *changes])
        out = args.out or recipe.with_suffix("")
    elif args.out is None:
        raise ValueError(f"name the data set to make: python data/prepare.py {' '.join(args.input)} --out data/NAME")
    else:
        inputs = [{**as_source(text), **options} for text in args.input]
        settings = config.load(PrepareConfig, None, [f"input={json.dumps(inputs, ensure_ascii=False)}", *changes])
        out = args.out
    if args.part is not None:
        part, n_parts = fraction(args.part)
        prepare.make_part(settings, out, part, n_parts, console=console)
    elif args.merge:
        prepare.merge(settings, out, console=console)
    else:
        make = prepare.scan_only if args.scan else prepare.prepare
        make(settings, out, console=console, overwrite=args.overwrite)


def fraction(text: str) -> tuple[int, int]:
    """I and N of "I/N"."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal()):
        raise ValueError(f"--part {text}: expected I/N, for example 2/4")
    return int(i), int(n)


if __name__ == "__main__":
    signals.run(main)

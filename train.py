"""Train a language model from a settings file.

    python train.py configs/quickstart.yaml [section.key=value ...]

The same command continues a run that was stopped; settings that it may change then are named with --allow. A missing data
set is prepared first if data/ holds its recipe.
"""

import argparse
from pathlib import Path

from gpt import signals


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a language model from a settings file; run it again to continue.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, nargs="?", help="a settings file, for example configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument(
        "--fresh", action="store_true", help="start NAME-2 beside an existing run instead of continuing it"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="let a run that goes on change this setting, like optim.lr (may be given again; recorded with its step)",
    )
    parser.add_argument(
        "--check-resume",
        action="store_true",
        help="prove on this machine that stopping changes nothing: 10 steps against 5 and 5; exit 0 if so, 1 if not",
    )
    parser.add_argument("--print", action="store_true", help="print the settings, defaults included, and stop")
    parser.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="PREFIX",
        help="print every setting with type, default and meaning, and stop",
    )
    parser.add_argument(
        "--wait-lock",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait so long for a process that still holds the run, as one that is just being stopped",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what the run will take: work, memory, time, disk; and stop"
    )
    parser.add_argument("--device", metavar="NAME", help="with --plan: a machine that need not be here, like h100")
    parser.add_argument("--devices", type=int, metavar="N", help="with --plan: how many of them")
    parser.add_argument(
        "--memory", metavar="SIZE", help="with --plan: what there is of each, like 12GB; else what it has free"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args, unknown = parser.parse_known_intermixed_args(argv)  # settings may follow flags
    if unknown:
        parser.error(f"unknown flag {unknown[0]}; settings have no dashes: section.key=value (--keys lists them)")
    for name in ("memory", "device", "devices"):
        if getattr(args, name) is not None and not args.plan:
            parser.error(f"--{name} is what --plan plans for; say --plan too")
    if args.devices is not None and args.devices < 1:
        parser.error(f"--devices ({args.devices}) must be at least 1")
    if args.fresh and args.allow:
        parser.error("--fresh starts another run, which may have any settings: leave --allow out")
    if args.check_resume and (args.fresh or args.allow):
        parser.error("--check-resume tries the settings as they stand, beside the run: leave --fresh and --allow out")
    return args


def main(argv: list[str]) -> int | None:
    args = arguments(argv)
    with signals.loading():
        from rich.console import Console

        from gpt import config, runtime
        from gpt.trainer import TrainConfig, train

    if args.keys is not None:
        from rich.table import Table

        table = Table("setting", "type", "default", "meaning", box=None)
        for row in config.describe(TrainConfig, args.keys):
            table.add_row(*map(str, row))
        Console().print(table)
        return None
    if args.config is None:
        raise ValueError("name a settings file, for example: python train.py configs/quickstart.yaml")
    settings = config.load(TrainConfig, args.config, args.overrides, {"name": args.config.stem})
    if args.print:
        print(config.dump(settings), end="")
        return None
    console = Console()
    if args.plan:
        from gpt import budget, memory, page

        room = None if args.memory is None else memory.size(args.memory)
        for block in budget.blocks(settings, room, args.device, args.devices):
            page.draw(block, console)
        return None
    data = settings.data
    for name in [data.path] if data.path is not None else data.mixture or []:
        out, recipe = Path(name), Path(f"{name}.yaml")
        if not out.exists() and recipe.exists():
            if runtime.world_size() > 1:  # each of them would
                raise ValueError(
                    f"{out} is not prepared; do that first, in one process: python data/prepare.py {recipe}"
                )
            from gpt import prepare

            console.print(f"{out} is not prepared yet: python data/prepare.py {recipe}", highlight=False)
            prepare.prepare(prepare.load_recipe(recipe, []), out, console=console)
    if args.check_resume:
        from gpt import rehearsal

        return rehearsal.check(settings, console)
    train(settings, fresh=args.fresh, allow=args.allow, wait_lock=args.wait_lock, console=console)
    return None


if __name__ == "__main__":
    signals.run(main)

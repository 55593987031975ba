"""`python -m benchmarks`: see the package's first lines."""
import argparse
import importlib
from pathlib import Path

from benchmarks.measure import record, table
from benchmarks.peers import SHAPES

NAMES = ("training", "decoding", "reward", "cost")


def main(argv: list[str] | None = None) -> None:
    "Measure, print the table, write the record."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Side-by-side measurements on the CPU.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(NAMES)}; nothing: all")
    parser.add_argument("--llama2c", metavar="PATH", help="llama2.c's compiled run program")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=tuple(SHAPES), help="models of training and decoding")
    parser.add_argument("--rounds", type=int, help="turns of every job")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two turns: does it run?")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the records")
    args = parser.parse_args(argv)
    if unknown := [n for n in args.names if n not in NAMES]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(NAMES)}")
    rounds = args.rounds or (2 if args.quick else None)
    for name in args.names or NAMES:
        settings = {"rounds": rounds} if rounds else {}
        rows = importlib.import_module(f"benchmarks.{name}").run(quick=args.quick, llama2c_path=args.llama2c, shapes=args.shapes, **settings)
        print(table(rows), flush=True)
        path = record(name, rows, args.out)
        if name == "cost":
            importlib.import_module("benchmarks.cost").figure(rows, path.with_suffix(".png"))
        print(f"-> {path}\n", flush=True)


if __name__ == "__main__":
    main()

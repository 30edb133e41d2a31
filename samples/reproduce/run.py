"""Run a headline row of a paper: its model, size, steps and schedule, with our re-implementation.

    python samples/reproduce/run.py                                  # all rows, not run here
    python samples/reproduce/run.py adaspa-hunyuanvideo --prompt-file prompts.txt
    python samples/reproduce/run.py sparse-vdit-wan --table modes.json --prompt "..." --print

What is not known here goes to `dit-sparse compare`, such as --seed, --out, --device, or another
--height. The weights are downloaded by diffusers unless --pipeline names a folder.
"""

import argparse
import shlex

from rows import ROWS


def command(row, table=None, given=()):
    """Arguments of `dit-sparse`: the row's, unless `given` has its own."""
    if "{table}" in row.method and table is None:
        raise SystemExit(f"this row needs --table FILE: {row.note}")
    known = {"pipeline": row.model, "method": row.method.format(table=table), **row.call}
    parts = ["compare"]
    for name, value in known.items():
        if f"--{name}" not in given:
            parts += [f"--{name}", str(value)]
    return [*parts, *given]


def show(name, row):
    figures = ", ".join(f"{key} {value}" for key, value in row.published.items())
    print(f"{name}: not run here\n  {row.paper} reports {figures} ({row.gpu})")
    print(f"  {row.model}, {row.call}\n  {row.method}\n  prompts: {row.prompts}")
    if row.note:
        print(f"  {row.note}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("row", nargs="?", choices=ROWS)
    parser.add_argument("--table", help="modes of Sparse-vDiT, from dit-sparse calibrate")
    parser.add_argument("--print", action="store_true", help="print the command and stop")
    args, given = parser.parse_known_args()
    if args.row is None:
        for name, row in ROWS.items():
            show(name, row)
        return
    row = ROWS[args.row]
    parts = command(row, args.table, given)
    print(shlex.join(["dit-sparse", *parts]))
    if args.print:
        return
    if not {"--prompt", "--prompt-file"} & set(given):
        parser.error(f"give --prompt-file or --prompt; the paper's prompts are {row.prompts}")
    from dit_sparse.cli import app

    app(parts)


if __name__ == "__main__":
    main()
